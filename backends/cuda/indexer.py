"""The lightning indexer without a wait: scores on tensor cores, then a radix selection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.cuda.ragged import position_of, request_of
from v4_ascend.backends.triton.paged import CODES, load_rows, slots_of
from v4_ascend.backends.triton.quant import e2m1_to_float, e8m0_to_float

ROWS = 64  # of a tile
TILES = 8  # of a program
MAX_SCORES = 1 << 26  # held at once: 256 MiB
DIGIT = 256


@triton.jit
def _fp4_halves(storage, slot, is_row, block_rows):
    """Even and odd channels of FP4 index rows, [n, 64] in bf16 each."""
    page = storage + slot // block_rows * (block_rows * 68)
    group, pair = tl.arange(0, 4), tl.arange(0, 16)
    at = (page + slot % block_rows * 64)[:, None, None]
    at += group[None, :, None] * 16 + pair[None, None, :]
    byte = tl.load(at, is_row[:, None, None], 0).to(tl.int32)
    tail = page + block_rows * 64 + slot % block_rows * 4
    scale = e8m0_to_float(tl.load(tail[:, None] + group[None, :], is_row[:, None], 0))
    low = (e2m1_to_float(byte & 15) * scale[:, :, None]).to(tl.bfloat16)
    high = (e2m1_to_float(byte >> 4) * scale[:, :, None]).to(tl.bfloat16)
    shape: tl.constexpr = (slot.shape[0], 64)
    return tl.reshape(low, shape), tl.reshape(high, shape)


@triton.jit
def _index_scores(
    q, weights, storage, table, scores, seq_lens, cu_seqlens,
    first_token, batch, n_heads, dim, n_rows, ratio, max_blocks, block_rows,
    RECORD: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Scores of some rows for one token; rows it does not see are left as they are."""
    here = tl.program_id(0).to(tl.int64)
    token = here + first_token
    request = request_of(cu_seqlens, token, batch, BATCH).to(tl.int64)
    seen = (position_of(seq_lens, cu_seqlens, token.to(tl.int32), request) + 1) // ratio
    first = tl.program_id(1) * (ROWS * TILES)
    end = tl.minimum(seen, first + ROWS * TILES)
    if first < end:
        head = tl.arange(0, HEADS)
        is_head = head < n_heads
        at = (token * n_heads + head[None, :]) * dim
        weight = tl.load(weights + token * n_heads + head, is_head, 0.0).to(tl.float32)
        if RECORD == 3:
            half = tl.arange(0, DIM // 2)
            even = tl.load(q + at + 2 * half[:, None], is_head[None, :], 0.0)
            odd = tl.load(q + at + 2 * half[:, None] + 1, is_head[None, :], 0.0)
        else:
            cols = tl.arange(0, DIM)
            queries = tl.load(
                q + at + cols[:, None], is_head[None, :] & (cols < dim)[:, None], 0.0
            )
        for begin in range(first, end, ROWS):
            row = begin + tl.arange(0, ROWS)
            is_row = row < end
            slot = slots_of(table, request, row, is_row, max_blocks, block_rows)
            if RECORD == 3:
                low, high = _fp4_halves(storage, slot, is_row, block_rows)
                products = tl.dot(high, odd, tl.dot(low, even))
            else:
                keys = load_rows(storage, slot, is_row, dim, block_rows, RECORD, DIM)
                products = tl.dot(keys.to(q.dtype.element_ty), queries)
            # Rounded where the published code rounds: that makes ties, and ties choose rows.
            products = tl.maximum(products, 0.0).to(tl.bfloat16).to(tl.float32)
            weighed = (products * weight[None, :]).to(tl.bfloat16).to(tl.float32)
            total = tl.sum(weighed, 1).to(tl.bfloat16)
            tl.store(scores + here * n_rows + row, total, is_row)


@triton.jit
def _ordered(x):
    """Integers from 0 to 2^32 - 1 that order as fp32 does, as int64; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _select(
    scores, ids, seq_lens, cu_seqlens, first_token, batch, n_rows, topk, ratio,
    IS_RAGGED: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """The `topk` highest of a token's scores, ascending by row; -1 behind them.

    `DIGITS` bytes of the keys, the highest first, say which of them is the last one chosen; of
    equal ones the lower rows are. bf16 scores differ in two bytes.
    """
    here = tl.program_id(0).to(tl.int64)
    seen = n_rows
    if IS_RAGGED:
        token = here + first_token
        request = request_of(cu_seqlens, token, batch, BATCH).to(tl.int64)
        position = position_of(seq_lens, cu_seqlens, token.to(tl.int32), request)
        seen = tl.minimum((position + 1) // ratio, n_rows)
    scores += here * n_rows
    ids += (here + first_token) * topk
    each, digit = tl.arange(0, BLOCK), tl.arange(0, 256)
    need = tl.minimum(topk, seen)
    prefix = tl.full((), 0, tl.int64)
    if seen > topk:
        for place in tl.static_range(DIGITS):
            shift = 24 - 8 * place
            count = tl.zeros((256,), tl.int32)
            for begin in range(0, seen, BLOCK):
                row = begin + each
                key = _ordered(tl.load(scores + row, row < seen, 0.0).to(tl.float32))
                is_candidate = (row < seen) & ((key >> (shift + 8)) == prefix)
                value = ((key >> shift) & 255).to(tl.int32)
                count += tl.histogram(value, 256, is_candidate)
            reach = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # candidates from a digit up
            last = tl.max(tl.where(reach >= need, digit, 0), 0)
            need -= tl.sum(tl.where(digit > last, count, 0), 0)
            prefix = (prefix << 8) | last
    written, vacant = tl.full((), 0, tl.int32), need
    for begin in range(0, seen, BLOCK):
        row = begin + each
        score = tl.load(scores + row, row < seen, 0.0).to(tl.float32)
        key = _ordered(score) >> (32 - 8 * DIGITS)
        is_all = seen <= topk
        at = ((key == prefix) & (row < seen)).to(tl.int32)
        is_last = (at != 0) & (tl.cumsum(at, 0) <= vacant)
        vacant -= tl.minimum(tl.sum(at, 0), vacant)
        chosen = ((row < seen) & (is_all | is_last | (key > prefix))).to(tl.int32)
        place = written + tl.cumsum(chosen, 0) - 1
        name = tl.where(score == float("-inf"), -1, row)
        tl.store(ids + place, name, chosen != 0)
        written += tl.sum(chosen, 0)
    for begin in range(0, topk, BLOCK):
        tl.store(ids + begin + each, -1, (begin + each >= written) & (begin + each < topk))


def index_topk(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """As the op `index_topk`: ids ascending, the same on every run."""
    n_tokens, n_rows = scores.shape
    topk = min(topk, n_rows)
    ids = torch.empty(n_tokens, topk, dtype=torch.int32, device=scores.device)
    if ids.numel():
        block = min(4096, max(256, triton.next_power_of_2(n_rows)))
        _select[(n_tokens,)](
            *(scores.contiguous(), ids, ids, ids, 0, 0, n_rows, topk, 1, False, 4, block, 1),
            num_warps=8,
        )
    return ids


def index_select(
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
    """As the op `index_select`, of bf16 queries; as wide as what the table can hold, or topk."""
    (n_tokens, n_heads, dim), batch = q.shape, len(seq_lens)
    n_rows = block_table.shape[1] * storage.shape[1]
    topk = min(topk, n_rows)
    ids = torch.empty(n_tokens, topk, dtype=torch.int32, device=q.device)
    if not ids.numel():
        return ids
    step = max(1, min(n_tokens, MAX_SCORES // n_rows))
    scores = torch.empty(step, n_rows, dtype=torch.bfloat16, device=q.device)
    wide = triton.next_power_of_2(batch)
    block = min(4096, max(256, triton.next_power_of_2(n_rows)))
    heads, depth = (max(16, triton.next_power_of_2(size)) for size in (n_heads, dim))
    for first in range(0, n_tokens, step):
        some = min(step, n_tokens - first)
        _index_scores[(some, triton.cdiv(n_rows, ROWS * TILES))](
            *(q.contiguous(), weights.contiguous(), storage, block_table.contiguous(), scores),
            *(seq_lens, cu_seqlens, first, batch, n_heads, dim, n_rows, compress_ratio),
            *(block_table.shape[1], storage.shape[1], CODES[record]),
            *(heads, depth, ROWS, TILES, wide),
            num_warps=4,
        )
        _select[(some,)](
            *(scores, ids, seq_lens, cu_seqlens, first, batch, n_rows, topk, compress_ratio),
            *(True, 2, block, wide),
            num_warps=8,
        )
    return ids
