"""Sparse attention on tensor cores, over bf16 rows and FP8 records of 512 channels.

A program has 64 heads of one token and some of its rows. A step with few tokens shares the rows
of each among several programs, whose results a second kernel joins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.cuda.device import n_processors
from v4_ascend.backends.cuda.ragged import position_of, request_of
from v4_ascend.backends.triton.quant import e8m0_to_float

DIM, ROPE = 512, 64
HEADS = 64
ROWS = 64  # of a tile
PAGED = {"bf16": 0, "fp8_584": 1, "fp8_640": 2}
MAX_PARTS = 32


@triton.jit
def _record_rows(storage, pairs, slot, is_row, block_rows, RECORD: tl.constexpr):
    """Rows [n, 512] in bf16, which holds them exactly: 7 groups of 64 FP8 channels, 64 in bf16.

    `storage` are the bytes, `pairs` the same memory as bf16.
    """
    group, channel = tl.arange(0, 8), tl.arange(0, 64)
    if RECORD == 1:
        page = slot // block_rows * (block_rows * 584)
        data = page + slot % block_rows * 576
        tail = page + block_rows * 576 + slot % block_rows * 8
        rope = (data + 448) // 2
    else:
        rope = slot * 320
        data = slot * 640 + 128
        tail = data + 448
    is_fp8 = (is_row[:, None] & (group < 7)[None, :])[:, :, None]
    at = data[:, None, None] + group[None, :, None] * 64 + channel[None, None, :]
    byte = tl.load(storage + at, is_fp8, 0)
    scale_at = storage + tail[:, None] + group[None, :]
    scale = e8m0_to_float(tl.load(scale_at, is_row[:, None] & (group < 7)[None, :], 0))
    value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    nope = (value * scale[:, :, None]).to(tl.bfloat16)
    rotated = tl.load(pairs + rope[:, None] + channel[None, :], is_row[:, None], 0.0)
    rows = tl.where((group < 7)[None, :, None], nope, rotated[:, None, :])
    return tl.reshape(rows, (slot.shape[0], 512))


@triton.jit
def _rows(storage, pairs, slot, is_row, block_rows, RECORD: tl.constexpr):
    if RECORD == 0:
        cols = tl.arange(0, 512)
        rows = tl.load(pairs + slot[:, None] * 512 + cols[None, :], is_row[:, None], 0.0)
    else:
        rows = _record_rows(storage, pairs, slot, is_row, block_rows, RECORD)
    return rows


@triton.jit
def _slots(table, request, row, is_row, max_blocks, block_rows):
    block = tl.load(table + request * max_blocks + row // block_rows, is_row, 0)
    return block.to(tl.int64) * block_rows + row % block_rows


@triton.jit
def _attend(q, k, is_visible, scale, top, total, acc):
    """Add rows k to the running softmax; exponents are of base 2, `scale` times log2(e)."""
    scores = tl.dot(q, tl.trans(k)) * scale
    scores = tl.where(is_visible[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A tile without a visible row leaves -inf; exp2(-inf - -inf) would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    acc = tl.dot(p.to(k.dtype), k, acc * shrink[:, None])
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _sparse_attn(
    q, window, window_pairs, window_table, rows, row_pairs, table, indices, sink, out,
    part_out, part_top, part_total, seq_lens, cu_seqlens,
    n_tokens, batch, n_heads, scale, window_size, ratio, topk, parts,
    window_blocks, window_rows, table_blocks, table_rows,
    HAS_ROWS: tl.constexpr, HAS_INDICES: tl.constexpr, RECORD: tl.constexpr,
    PARTS: tl.constexpr, BATCH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    part = tl.program_id(2)
    request = request_of(cu_seqlens, token, batch, BATCH).to(tl.int64)
    position = position_of(seq_lens, cu_seqlens, token.to(tl.int32), request)
    cols = tl.arange(0, 512)
    at = (token * n_heads + head[:, None]) * 512 + cols[None, :]
    is_head = head[:, None] < n_heads
    queries = tl.load(q + at, is_head, 0.0)
    each = tl.arange(0, ROWS)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, 512), tl.float32)
    first = tl.maximum(position - window_size + 1, 0)
    near = (position - first + ROWS) // ROWS  # tiles of the window, then those of the rows
    seen, end = 0, 0
    if HAS_ROWS:
        seen = (position + 1) // ratio
        end = topk if HAS_INDICES else seen
    tiles = near + (end + ROWS - 1) // ROWS
    share = (tiles + parts - 1) // parts
    mine, mine_end = part * share, tl.minimum((part + 1) * share, tiles)
    for tile in range(mine, tl.minimum(mine_end, near)):
        row = first + tile * ROWS + each
        is_visible = row <= position
        slot = _slots(window_table, request, row, is_visible, window_blocks, window_rows)
        k = _rows(window, window_pairs, slot, is_visible, window_rows, RECORD)
        top, total, acc = _attend(queries, k, is_visible, scale, top, total, acc)
    if HAS_ROWS:
        for tile in range(tl.maximum(mine, near), mine_end):
            row = (tile - near) * ROWS + each
            is_visible = row < end
            if HAS_INDICES:
                row = tl.load(indices + token * topk + row, is_visible, -1)
                is_visible = (row >= 0) & (row < seen)
            slot = _slots(table, request, row, is_visible, table_blocks, table_rows)
            k = _rows(rows, row_pairs, slot, is_visible, table_rows, RECORD)
            top, total, acc = _attend(queries, k, is_visible, scale, top, total, acc)
    if PARTS:
        place = (part * n_tokens + token) * n_heads + head
        tl.store(part_top + place, top, head < n_heads)
        tl.store(part_total + place, total, head < n_heads)
        tl.store(part_out + place[:, None] * 512 + cols[None, :], acc, is_head)
    else:
        extra = tl.load(sink + head, head < n_heads, 0.0) * 1.4426950408889634
        total += tl.exp2(extra - top)
        tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), is_head)


@triton.jit
def _join(
    part_out, part_top, part_total, sink, out, n_tokens, n_heads, parts,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One head of one token: its parts under one softmax."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    each, cols = tl.arange(0, PARTS), tl.arange(0, 512)
    place = (each * n_tokens + token) * n_heads + head
    top = tl.load(part_top + place, each < parts, float("-inf"))
    extra = tl.load(sink + head) * 1.4426950408889634
    best = tl.max(top, 0)
    weight = tl.exp2(top - best)
    total = tl.sum(tl.load(part_total + place, each < parts, 0.0) * weight, 0)
    total += tl.exp2(extra - best)
    acc = tl.zeros((512,), tl.float32)
    for part in range(parts):
        at = (part * n_tokens + token) * n_heads + head
        share = tl.exp2(tl.load(part_top + at) - best)
        acc += tl.load(part_out + at * 512 + cols) * share
    at = (token * n_heads + head) * 512 + cols
    tl.store(out + at, (acc / total).to(out.dtype.element_ty))


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
    """As the op `sparse_attn`, of bf16 queries with 512 channels."""
    q = q.contiguous()
    out = torch.empty_like(q)
    n_tokens, n_heads, _ = q.shape
    if not n_tokens:
        return out
    near = window_block_table.contiguous()
    has_rows = compressed is not None and block_table is not None and bool(compress_ratio)
    rows = compressed if compressed is not None else window
    far = block_table.contiguous() if block_table is not None else near
    chosen = indices.contiguous() if indices is not None else near
    topk = indices.shape[1] if indices is not None else 0
    ratio = max(compress_ratio, 1)
    longest = topk if indices is not None else far.shape[1] * rows.shape[1] if has_rows else 0
    blocks = triton.cdiv(n_heads, HEADS)
    parts = _parts(n_tokens * blocks, window_size, longest, n_processors(q.device))
    size = (parts, n_tokens, n_heads) if parts > 1 else (1,)
    part_top, part_total = torch.empty(2, *size, device=q.device)
    part_out = torch.empty(*size, DIM, device=q.device) if parts > 1 else part_top
    _sparse_attn[(n_tokens, blocks, parts)](
        *(q, window, _pairs(window), near, rows, _pairs(rows), far, chosen, sink, out),
        *(part_out, part_top, part_total, seq_lens, cu_seqlens),
        *(n_tokens, len(seq_lens), n_heads, softmax_scale * 1.4426950408889634),
        *(window_size, ratio, topk, parts),
        *(near.shape[1], window.shape[1], far.shape[1], rows.shape[1]),
        *(has_rows, indices is not None, PAGED[record], parts > 1),
        *(triton.next_power_of_2(len(seq_lens)), HEADS, ROWS),
        num_warps=8,
        num_stages=2,
    )
    if parts > 1:
        _join[(n_tokens, n_heads)](
            *(part_out, part_top, part_total, sink, out, n_tokens, n_heads, parts),
            triton.next_power_of_2(parts),
        )
    return out


def _parts(programs: int, window_size: int, n_rows: int, processors: int) -> int:
    """Return how many programs share a token's rows: as many as keep the device busy.

    `n_rows` is what the table could hold: of a shorter request some programs find nothing to do.
    """
    tiles = triton.cdiv(window_size, ROWS) + triton.cdiv(n_rows, ROWS)
    return max(1, min(processors // programs, tiles, MAX_PARTS))


def _pairs(storage: torch.Tensor) -> torch.Tensor:
    return storage.view(torch.bfloat16)
