"""Operators over ragged batches and paged caches, request by request."""

from __future__ import annotations

import torch

from v4_ascend.backends.mindspore.dense import ms_index_topk
from v4_ascend.backends.mindspore.exchange import rows_of, run
from v4_ascend.ops import compress_kv, index_scores, index_select, sparse_attn
from v4_ascend.ops.ragged import Span, locate, spans

NEG_INF = float("-inf")
PLAIN = ("fp32", "bf16")


def _why_not_record(record: str, storage: torch.Tensor) -> str | None:
    if record not in PLAIN:
        return f"record {record}: MindSpore reads plain rows, {' or '.join(PLAIN)}"
    if storage.shape[-1] % 2:
        return f"rows of {storage.shape[-1]} channels: must be even"
    return None


def _request_rows(
    storage: torch.Tensor, block_table: torch.Tensor, request: int, row: torch.Tensor
) -> torch.Tensor:
    block_rows = storage.shape[1]
    block = block_table[request, row // block_rows].long()
    return rows_of(storage, block * block_rows + row % block_rows)


def _why_not_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
) -> str | None:
    return _why_not_record(record, storage)


@index_scores.kernel("mindspore", provider="mindspore", why_not=_why_not_scores)
def ms_index_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
) -> torch.Tensor:
    """The lightning indexer's scores, fp32 inside."""
    n_rows = int(seq_lens.max()) // compress_ratio if len(seq_lens) else 0
    scores = torch.full((q.shape[0], n_rows), NEG_INF)
    for span in spans(seq_lens, cu_seqlens):
        seen = span.stop // compress_ratio
        if seen and span.begin < span.end:
            part = slice(span.begin, span.end)
            keys = _request_rows(storage, block_table, span.request, torch.arange(seen))
            args = (q[part], weights[part], keys, span.start, compress_ratio)
            scores[part, :seen] = run("attention.index_scores", *args)
    return scores


def _why_not_select(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    topk: int,
) -> str | None:
    return _why_not_record(record, storage)


@index_select.kernel("mindspore", provider="mindspore", why_not=_why_not_select)
def ms_index_select(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    topk: int,
) -> torch.Tensor:
    """Scores, then the highest of them."""
    scores = ms_index_scores(
        q, weights, storage, record, block_table, seq_lens, cu_seqlens, compress_ratio
    )
    return ms_index_topk(scores, topk)


def _why_not_attn(
    q: torch.Tensor,
    window: torch.Tensor,
    window_block_table: torch.Tensor,
    compressed: torch.Tensor | None,
    block_table: torch.Tensor | None,
    indices: torch.Tensor | None,
    record: str,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sink: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    compress_ratio: int,
) -> str | None:
    return _why_not_record(record, window)


@sparse_attn.kernel("mindspore", provider="mindspore", why_not=_why_not_attn)
def ms_sparse_attn(
    q: torch.Tensor,
    window: torch.Tensor,
    window_block_table: torch.Tensor,
    compressed: torch.Tensor | None,
    block_table: torch.Tensor | None,
    indices: torch.Tensor | None,
    record: str,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sink: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    compress_ratio: int,
) -> torch.Tensor:
    """Dense products with what a request's tokens can see, masked."""
    out = torch.empty_like(q)
    for span in spans(seq_lens, cu_seqlens):
        if span.begin == span.end:
            continue
        part = slice(span.begin, span.end)
        first = max(span.start - window_size + 1, 0)
        tokens = torch.arange(first, span.stop)
        near = _request_rows(window, window_block_table, span.request, tokens)
        far = chosen = None
        if compressed is not None and block_table is not None and span.stop >= compress_ratio:
            rows = torch.arange(span.stop // compress_ratio)
            far = _request_rows(compressed, block_table, span.request, rows)
            chosen = None if indices is None else indices[part]
        out[part] = run(
            "attention.sparse_attn",
            *(q[part], near, far, chosen, sink, softmax_scale),
            *(span.start, first, window_size, max(compress_ratio, 1)),
        )
    return out


@compress_kv.kernel("mindspore", provider="mindspore")
def ms_compress_kv(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    state: torch.Tensor,
    state_slots: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project, pool whole groups, norm and rotate; the state is carried by token position."""
    rows = torch.zeros(cos.shape[0], norm_weight.shape[0], dtype=x.dtype)
    if not len(x):
        return rows, state
    request, position = locate(seq_lens, cu_seqlens)
    new = run("attention.project", x, wkv, wgate, ape[position % compress_ratio])
    pooled = []
    for span in spans(seq_lens, cu_seqlens):
        if span.stop // compress_ratio > span.start // compress_ratio:
            slot = state[state_slots[span.request]]
            overlaps = ape.shape[1] == 2 * norm_weight.shape[0]
            tokens = _whole_groups(span, new, slot, compress_ratio, overlaps)
            is_first = span.start < compress_ratio
            pooled.append(run("attention.pool", tokens, compress_ratio, rows.shape[1], is_first))
    keep = state.shape[1]
    last = position >= seq_lens.long()[request] - keep
    state[state_slots[request[last]], position[last] % keep] = new[last]
    if pooled:
        packed = torch.cat(pooled)
        n = len(packed)
        args = (packed, x[:1], norm_weight, cos[:n], sin[:n], norm_eps)
        rows[:n] = run("attention.finish", *args)
    return rows, state


def _whole_groups(
    span: Span, new: torch.Tensor, slot: torch.Tensor, ratio: int, overlaps: bool
) -> torch.Tensor:
    """Rows [K | Z] of the groups a request completes, and of the one before if they overlap."""
    first = max(span.start // ratio - overlaps, 0) * ratio
    carried = slot[torch.arange(first, span.start) % slot.shape[0]]
    tokens = torch.cat((carried, new[span.begin : span.end]))
    return tokens[: span.stop // ratio * ratio - first]
