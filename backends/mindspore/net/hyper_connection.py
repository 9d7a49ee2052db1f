"""Hyper-connections."""

from mindspore import Tensor, ops
from mindspore import dtype as mstype


def _mixes(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = x.astype(mstype.float32).reshape(x.shape[0], -1)  # no bf16 reshape in graphs on CPU
    return ops.matmul(flat, fn.T) * ops.rsqrt(ops.square(flat).mean(-1, keep_dims=True) + eps)


def _collapse(x: Tensor, pre: Tensor) -> Tensor:
    return (pre.expand_dims(-1) * x.astype(mstype.float32)).sum(1).astype(x.dtype)


def hc_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op `hc_pre`."""
    hc = x.shape[1]
    mixes = _mixes(x, fn, norm_eps)
    pre = ops.sigmoid(mixes[:, :hc] * scale[0] + base[:hc]) + hc_eps
    post = 2.0 * ops.sigmoid(mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    comb = (mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(-1, hc, hc)
    comb = ops.softmax(comb, -1) + hc_eps
    comb = comb / (comb.sum(-2, keepdims=True) + hc_eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdims=True) + hc_eps)
        comb = comb / (comb.sum(-2, keepdims=True) + hc_eps)
    return _collapse(x, pre), post, comb


def hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """As the op `hc_post`."""
    wide = residual.astype(mstype.float32)
    mixed = (comb.expand_dims(-1) * wide.expand_dims(2)).sum(1)
    out = post.expand_dims(-1) * x.astype(mstype.float32).expand_dims(1) + mixed
    return out.astype(residual.dtype)


def hc_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """As the op `hc_head`."""
    return _collapse(x, ops.sigmoid(_mixes(x, fn, norm_eps) * scale + base) + hc_eps)
