"""One request's part of the indexer, of sparse attention and of compression."""

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from v4_ascend.backends.mindspore.net.norm_rope import rms_norm, rope

NEG_INF = float("-inf")


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, start: int, ratio: int) -> Tensor:
    """Scores fp32 [n_tokens, n_rows] of tokens at positions start + i; -inf where hidden.

    Shapes: q [n_tokens, n_heads, head_dim], weights [n_tokens, n_heads], keys [n_rows, head_dim].
    """
    n_tokens, n_heads, head_dim = q.shape
    wide = q.astype(mstype.float32).reshape(-1, head_dim)
    products = ops.relu(ops.matmul(wide, keys.astype(mstype.float32).T))
    products = products.reshape(n_tokens, n_heads, keys.shape[0])
    scores = (products * weights.astype(mstype.float32).expand_dims(-1)).sum(1)
    return ops.where(_completed(n_tokens, keys.shape[0], start, ratio), scores, NEG_INF)


def _completed(n_tokens: int, n_rows: int, start: int, ratio: int) -> Tensor:
    """Whether a token sees a row: all of its tokens are there."""
    visible = (ops.arange(start, start + n_tokens) + 1) // ratio
    return ops.arange(n_rows).expand_dims(0) < visible.expand_dims(1)


def sparse_attn(
    q: Tensor,
    window: Tensor,
    compressed: Tensor | None,
    indices: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    start: int,
    first: int,
    window_size: int,
    ratio: int,
) -> Tensor:
    """Attend from tokens at positions start + i to window rows of tokens first + j.

    Shapes: q [n_tokens, n_heads, head_dim]; window [n, head_dim]; compressed [n_rows, head_dim];
    indices [n_tokens, topk] int32, None for every completed row.
    """
    n_tokens, n_heads, head_dim = q.shape
    position = ops.arange(start, start + n_tokens).expand_dims(1)
    back = position - ops.arange(first, first + window.shape[0]).expand_dims(0)
    visible = ops.logical_and(back >= 0, back < window_size)
    rows = window.astype(mstype.float32)
    if compressed is not None:
        n_rows = compressed.shape[0]
        here = _completed(n_tokens, n_rows, start, ratio)
        if indices is not None:
            here = ops.logical_and(here, _chosen(indices, n_rows))
        rows = ops.cat((rows, compressed.astype(mstype.float32)), 0)
        visible = ops.cat((visible, here), 1)
    wide = q.astype(mstype.float32).reshape(-1, head_dim)
    scores = ops.matmul(wide, rows.T).reshape(n_tokens, n_heads, rows.shape[0]) * softmax_scale
    scores = ops.where(visible.expand_dims(1), scores, NEG_INF)
    top = ops.amax(scores, -1, True)
    p = ops.exp(scores - top)
    total = p.sum(-1, keepdims=True) + ops.exp(sink.expand_dims(-1) - top)
    p = p.astype(q.dtype).astype(mstype.float32)  # the published kernel's rounding
    o = ops.matmul(p.reshape(-1, rows.shape[0]), rows).reshape(n_tokens, n_heads, head_dim)
    return (o / total).astype(q.dtype)


def _chosen(indices: Tensor, n_rows: int) -> Tensor:
    """Whether a row is among a token's ids; ids out of range fall on a column of their own."""
    spare = ops.logical_or(indices < 0, indices >= n_rows)
    ids = ops.where(spare, n_rows, indices).astype(mstype.int64)
    none = ops.zeros((indices.shape[0], n_rows + 1), mstype.float32)
    marked = ops.tensor_scatter_elements(none, ids, ops.ones(ids.shape, mstype.float32), 1)
    return marked[:, :n_rows] > 0


def project(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor) -> Tensor:
    """Rows [K | Z] fp32 of every token; `ape` is that of each token already, [n_tokens, w]."""
    wide = x.astype(mstype.float32)
    return ops.cat((ops.matmul(wide, wkv.T), ops.matmul(wide, wgate.T) + ape), -1)


def pool(tokens: Tensor, ratio: int, head_dim: int, is_first: bool) -> Tensor:
    """Groups' rows [n, head_dim] of whole groups of tokens [n * ratio, 2 w]; as the reference.

    With overlap (w = 2 head_dim) the tokens begin one group early, or `is_first` adds one of
    weight zero.
    """
    width = tokens.shape[1] // 2
    kv = tokens[:, :width].reshape(-1, ratio, width)
    score = tokens[:, width:].reshape(-1, ratio, width)
    if width == 2 * head_dim:
        if is_first:
            kv = ops.cat((ops.zeros_like(kv[:1]), kv), 0)
            score = ops.cat((ops.full_like(score[:1], NEG_INF), score), 0)
        n = kv.shape[0]
        kv = ops.cat((kv[: n - 1, :, :head_dim], kv[1:, :, head_dim:]), 1)
        score = ops.cat((score[: n - 1, :, :head_dim], score[1:, :, head_dim:]), 1)
    return (kv * ops.softmax(score, 1)).sum(1)


def finish(
    pooled: Tensor, like: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """Round to the dtype of `like`, norm and rotate pooled rows."""
    return rope(rms_norm(pooled.astype(like.dtype), norm_weight, eps), cos, sin, 1.0)
