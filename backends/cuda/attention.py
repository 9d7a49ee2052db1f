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
from v4_ascend.backends.triton.paged import slots_of
from v4_ascend.backends.triton.quant import e8m0_to_float

DIM = 512
HEADS = 64
ROWS = 64  # of a tile
PAGED = {"bf16": 0, "fp8_584": 1, "fp8_640": 2}
MAX_PARTS = 32


@triton.jit
def _places(slot, block_rows, RECORD: tl.constexpr):
    """Where rows begin: FP8 channels and scales in bytes, rotated channels in pairs of bytes."""
    if RECORD == 0:
        pairs = slot * 512
        data, tail = pairs, pairs
    elif RECORD == 1:
        page = slot // block_rows * (block_rows * 584)
        data = page + slot % block_rows * 576
        tail = page + block_rows * 576 + slot % block_rows * 8
        pairs = data // 2 - 224
    else:
        data = slot * 640 + 128
        tail = data + 448
        pairs = slot * 320 - 448
    return data, tail, pairs


@triton.jit
def _scales(words, at, is_row, RECORD: tl.constexpr):
    """The seven scales of each row in two integers: one wait for all of them."""
    low, high = at[0].to(tl.int32) * 0, at[0].to(tl.int32) * 0
    if RECORD != 0:
        low = tl.load(words + at[1] // 4, is_row, 0)
        high = tl.load(words + at[1] // 4 + 1, is_row, 0)
    return low, high


@triton.jit
def _group(storage, pairs, at, scales, is_row, GROUP: tl.constexpr, RECORD: tl.constexpr):
    """64 channels of rows, [n, 64] in bf16, which holds FP8 times a power of two exactly."""
    data, _tail, pair = at
    channel = GROUP * 64 + tl.arange(0, 64)[None, :]
    if RECORD == 0 or GROUP == 7:
        rows = tl.load(pairs + pair[:, None] + channel, is_row[:, None], 0.0)
    else:
        byte = tl.load(storage + data[:, None] + channel, is_row[:, None], 0)
        scale = e8m0_to_float((scales[GROUP // 4] >> (8 * (GROUP % 4))) & 255)
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        rows = (value * scale[:, None]).to(tl.bfloat16)
    return rows


@triton.jit
def _attend(
    storage, pairs, words, slot, block_rows, is_visible, q, state, scale, RECORD: tl.constexpr
):
    """Add rows to the running softmax; exponents are of base 2, `scale` has log2(e) in it.

    By groups of channels: a whole row and all sums at once have no room in registers.
    """
    top, total, a0, a1, a2, a3, a4, a5, a6, a7 = state
    at = _places(slot, block_rows, RECORD)
    scales = _scales(words, at, is_visible, RECORD)
    k0 = _group(storage, pairs, at, scales, is_visible, 0, RECORD)
    scores = tl.dot(q[0], tl.trans(k0))
    k1 = _group(storage, pairs, at, scales, is_visible, 1, RECORD)
    scores = tl.dot(q[1], tl.trans(k1), scores)
    k2 = _group(storage, pairs, at, scales, is_visible, 2, RECORD)
    scores = tl.dot(q[2], tl.trans(k2), scores)
    k3 = _group(storage, pairs, at, scales, is_visible, 3, RECORD)
    scores = tl.dot(q[3], tl.trans(k3), scores)
    k4 = _group(storage, pairs, at, scales, is_visible, 4, RECORD)
    scores = tl.dot(q[4], tl.trans(k4), scores)
    k5 = _group(storage, pairs, at, scales, is_visible, 5, RECORD)
    scores = tl.dot(q[5], tl.trans(k5), scores)
    k6 = _group(storage, pairs, at, scales, is_visible, 6, RECORD)
    scores = tl.dot(q[6], tl.trans(k6), scores)
    k7 = _group(storage, pairs, at, scales, is_visible, 7, RECORD)
    scores = tl.dot(q[7], tl.trans(k7), scores) * scale
    scores = tl.where(is_visible[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A tile without a visible row leaves -inf; exp2(-inf - -inf) would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    exact = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(exact, 1)
    p, shrink = exact.to(tl.bfloat16), shrink[:, None]
    a0 = tl.dot(p, k0, a0 * shrink)
    a1 = tl.dot(p, k1, a1 * shrink)
    a2 = tl.dot(p, k2, a2 * shrink)
    a3 = tl.dot(p, k3, a3 * shrink)
    a4 = tl.dot(p, k4, a4 * shrink)
    a5 = tl.dot(p, k5, a5 * shrink)
    a6 = tl.dot(p, k6, a6 * shrink)
    a7 = tl.dot(p, k7, a7 * shrink)
    return new_top, total, a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _chosen(
    indices, table, token, request, tile, seen, end, topk, table_blocks, table_rows,
    HAS_INDICES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Slots of a tile of compressed rows, and which of them there are."""
    row = tile * ROWS + tl.arange(0, ROWS)
    is_visible = row < end
    if HAS_INDICES:
        row = tl.load(indices + token * topk + row, is_visible, -1)
        is_visible = (row >= 0) & (row < seen)
    return slots_of(table, request, row, is_visible, table_blocks, table_rows), is_visible


@triton.jit
def _sparse_attn(
    q, window, window_pairs, window_words, window_table,
    rows, row_pairs, row_words, table, indices, sink, out,
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
    channel, is_head = tl.arange(0, 64), head < n_heads
    at = (token * n_heads + head) * 512
    from_q = q + at[:, None] + channel[None, :]
    q0 = tl.load(from_q, is_head[:, None], 0.0)
    q1 = tl.load(from_q + 64, is_head[:, None], 0.0)
    q2 = tl.load(from_q + 128, is_head[:, None], 0.0)
    q3 = tl.load(from_q + 192, is_head[:, None], 0.0)
    q4 = tl.load(from_q + 256, is_head[:, None], 0.0)
    q5 = tl.load(from_q + 320, is_head[:, None], 0.0)
    q6 = tl.load(from_q + 384, is_head[:, None], 0.0)
    q7 = tl.load(from_q + 448, is_head[:, None], 0.0)
    queries = (q0, q1, q2, q3, q4, q5, q6, q7)
    each, zero = tl.arange(0, ROWS), tl.zeros((HEADS, 64), tl.float32)
    none = tl.full((HEADS,), float("-inf"), tl.float32)
    state = (none, tl.zeros((HEADS,), tl.float32), zero, zero, zero, zero, zero, zero, zero, zero)
    first = tl.maximum(position - window_size + 1, 0)
    near = (position - first + ROWS) // ROWS  # tiles of the window, then those of the rows
    seen, end = 0, 0
    if HAS_ROWS:
        seen = (position + 1) // ratio
        end = topk if HAS_INDICES else seen
    tiles = near + (end + ROWS - 1) // ROWS
    share = (tiles + parts - 1) // parts
    mine, mine_end = part * share, tl.minimum((part + 1) * share, tiles)
    # Where a tile's rows are is looked up a tile ahead: two waits that nothing else would hide.
    last = tl.minimum(mine_end, near)
    row = first + mine * ROWS + each
    is_visible = row <= position
    slot = slots_of(window_table, request, row, is_visible, window_blocks, window_rows)
    for tile in range(mine, last):
        row = first + (tile + 1) * ROWS + each
        is_next = row <= position
        next_slot = slots_of(window_table, request, row, is_next, window_blocks, window_rows)
        state = _attend(
            *(window, window_pairs, window_words, slot, window_rows, is_visible),
            *(queries, state, scale, RECORD),
        )
        slot, is_visible = next_slot, is_next
    if HAS_ROWS:
        mine = tl.maximum(mine, near)
        slot, is_visible = _chosen(
            indices, table, token, request, mine - near, seen, end, topk, table_blocks, table_rows,
            HAS_INDICES, ROWS,
        )  # fmt: skip
        for tile in range(mine, mine_end):
            next_slot, is_next = _chosen(
                indices, table, token, request, tile + 1 - near, seen, end, topk, table_blocks,
                table_rows, HAS_INDICES, ROWS,
            )  # fmt: skip
            state = _attend(
                *(rows, row_pairs, row_words, slot, table_rows, is_visible),
                *(queries, state, scale, RECORD),
            )
            slot, is_visible = next_slot, is_next
    top, total = state[0], state[1]
    if PARTS:
        place = (part * n_tokens + token) * n_heads + head
        tl.store(part_top + place, top, is_head)
        tl.store(part_total + place, total, is_head)
        to = part_out + place[:, None] * 512 + channel[None, :]
        for group in tl.static_range(8):
            tl.store(to + group * 64, state[2 + group], is_head[:, None])
    else:
        extra = tl.load(sink + head, is_head, 0.0) * 1.4426950408889634
        inverse = 1.0 / (total + tl.exp2(extra - top))[:, None]
        to = out + at[:, None] + channel[None, :]
        for group in tl.static_range(8):
            o = (state[2 + group] * inverse).to(out.dtype.element_ty)
            tl.store(to + group * 64, o, is_head[:, None])


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
        *(q, window, window.view(torch.bfloat16), window.view(torch.int32), near),
        *(rows, rows.view(torch.bfloat16), rows.view(torch.int32), far, chosen, sink, out),
        *(part_out, part_top, part_total, seq_lens, cu_seqlens),
        *(n_tokens, len(seq_lens), n_heads, softmax_scale * 1.4426950408889634),
        *(window_size, ratio, topk, parts),
        *(near.shape[1], window.shape[1], far.shape[1], rows.shape[1]),
        *(has_rows, indices is not None, PAGED[record], parts > 1),
        *(triton.next_power_of_2(len(seq_lens)), HEADS, ROWS),
        num_warps=8,
        # Rows a tile ahead of the products; of bf16 rows two tiles have no room.
        num_stages=2 if record == "bf16" else 3,
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
