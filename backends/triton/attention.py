"""Sparse attention: a token's window and its compressed rows in one online softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.triton.paged import CODES, load_rows, slots_of
from v4_ascend.backends.triton.ragged import locate

ROWS_AT_ONCE = 32  # of a tile: at 512 channels, 32 KiB of bf16


@triton.jit
def _attend(
    q, k, is_visible, scale, top, total, acc, DTYPE: tl.constexpr
):  # fmt: skip
    """Add rows k [n, dim] to the running softmax of queries q [heads, dim]."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(is_visible[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A tile without a visible row leaves -inf; exp(-inf - -inf) would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp(scores - base[:, None])
    shrink = tl.exp(top - base)
    acc = acc * shrink[:, None] + tl.dot(p.to(DTYPE), k, input_precision="ieee")
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _sparse_attn(
    q, window, window_table, compressed, table, indices, sink, out, requests, positions,
    n_heads, dim, scale, window_size, ratio, topk,
    window_blocks, window_rows, table_blocks, table_rows,
    HAS_ROWS: tl.constexpr, HAS_INDICES: tl.constexpr, RECORD: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    request = tl.load(requests + token).to(tl.int64)
    position = tl.load(positions + token)
    cols = tl.arange(0, DIM)
    at = (token * n_heads + head[:, None]) * dim + cols[None, :]
    mask = (head[:, None] < n_heads) & (cols[None, :] < dim)
    queries = tl.load(q + at, mask, 0.0)
    each = tl.arange(0, ROWS)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, DIM), tl.float32)
    first = tl.maximum(position - window_size + 1, 0)
    for begin in range(first, position + 1, ROWS):
        row = begin + each
        is_visible = row <= position
        slot = slots_of(window_table, request, row, is_visible, window_blocks, window_rows)
        k = load_rows(window, slot, is_visible, dim, window_rows, RECORD, DIM)
        k = k.to(queries.dtype)
        top, total, acc = _attend(queries, k, is_visible, scale, top, total, acc, queries.dtype)
    if HAS_ROWS:
        seen = (position + 1) // ratio
        end = topk if HAS_INDICES else seen
        for begin in range(0, end, ROWS):
            row = begin + each
            is_visible = row < end
            if HAS_INDICES:
                row = tl.load(indices + token * topk + row, is_visible, -1)
                is_visible = (row >= 0) & (row < seen)
            slot = slots_of(table, request, row, is_visible, table_blocks, table_rows)
            k = load_rows(compressed, slot, is_visible, dim, table_rows, RECORD, DIM)
            k = k.to(queries.dtype)
            top, total, acc = _attend(queries, k, is_visible, scale, top, total, acc, queries.dtype)
    total += tl.exp(tl.load(sink + head, head < n_heads, 0.0) - top)
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask)


def sparse_attn(
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
    """As the op `sparse_attn`."""
    q = q.contiguous()
    out = torch.empty_like(q)
    n_tokens, n_heads, dim = q.shape
    if not n_tokens:
        return out
    request, position = locate(n_tokens, seq_lens, cu_seqlens)
    near = window_block_table.contiguous()
    has_rows = compressed is not None and block_table is not None and bool(compress_ratio)
    rows = compressed if compressed is not None else window
    far = block_table.contiguous() if block_table is not None else near
    chosen = indices.contiguous() if indices is not None else request
    topk = indices.shape[1] if indices is not None else 0
    wide = triton.next_power_of_2(max(dim, 16))
    heads = max(16, min(64 if wide <= 256 else 32, triton.next_power_of_2(n_heads)))
    _sparse_attn[(n_tokens, triton.cdiv(n_heads, heads))](
        *(q, window, near, rows, far, chosen, sink, out, request, position),
        *(n_heads, dim, softmax_scale, window_size, max(compress_ratio, 1), topk),
        *(near.shape[1], window.shape[1], far.shape[1], rows.shape[1]),
        *(has_rows, indices is not None, CODES[record], heads, wide, ROWS_AT_ONCE),
        num_warps=8 if wide > 128 else 4,
        num_stages=1,
    )
    return out
