"""The lightning indexer without a wait: scores on tensor cores, then a selection in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.cuda.ragged import position_of, request_of
from v4_ascend.backends.triton.paged import CODES, load_rows, slots_of
from v4_ascend.backends.triton.quant import e8m0_to_float

ROWS = 64  # of a tile
TILES = 8  # of a program
MAX_SCORES = 1 << 26  # held at once: 128 MiB
CHUNK = 16384  # scores that a program holds in registers


@triton.jit
def _fp4_halves(storage, slot, is_row, block_rows):
    """Even and odd channels of FP4 index rows, [n, 64] in bf16 each.

    The bits of e2m1, moved to those of fp16, are its value times 2^-14.
    """
    page = storage + slot // block_rows * (block_rows * 68)
    group, pair = tl.arange(0, 4), tl.arange(0, 16)
    at = (page + slot % block_rows * 64)[:, None, None]
    at += group[None, :, None] * 16 + pair[None, None, :]
    byte = tl.load(at, is_row[:, None, None], 0).to(tl.int16)
    tail = page + block_rows * 64 + slot % block_rows * 4
    scale = e8m0_to_float(tl.load(tail[:, None] + group[None, :], is_row[:, None], 0)) * 16384.0
    low = ((byte & 7) << 9) | ((byte & 8) << 12)
    high = ((byte & 0x70) << 5) | ((byte & 0x80) << 8)
    low = low.to(tl.float16, bitcast=True).to(tl.float32) * scale[:, :, None]
    high = high.to(tl.float16, bitcast=True).to(tl.float32) * scale[:, :, None]
    shape: tl.constexpr = (slot.shape[0], 64)
    return tl.reshape(low.to(tl.bfloat16), shape), tl.reshape(high.to(tl.bfloat16), shape)


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
        cols = tl.arange(0, DIM)
        at = (token * n_heads + head[:, None]) * dim + cols[None, :]
        queries = tl.load(q + at, is_head[:, None] & (cols < dim)[None, :], 0.0)
        weight = tl.load(weights + token * n_heads + head, is_head, 0.0).to(tl.float32)
        if RECORD == 3:
            even, odd = tl.split(tl.reshape(queries, (HEADS, DIM // 2, 2)))
        for begin in range(first, end, ROWS):
            row = begin + tl.arange(0, ROWS)
            is_row = row < end
            slot = slots_of(table, request, row, is_row, max_blocks, block_rows)
            if RECORD == 3:
                low, high = _fp4_halves(storage, slot, is_row, block_rows)
                products = tl.dot(high, tl.trans(odd), tl.dot(low, tl.trans(even)))
            else:
                keys = load_rows(storage, slot, is_row, dim, block_rows, RECORD, DIM)
                products = tl.dot(keys.to(q.dtype.element_ty), tl.trans(queries))
            # Rounded where the published code rounds: that makes ties, and ties choose rows.
            products = tl.maximum(products, 0.0).to(tl.bfloat16).to(tl.float32)
            weighed = (products * weight[None, :]).to(tl.bfloat16).to(tl.float32)
            total = tl.sum(weighed, 1).to(tl.bfloat16)
            tl.store(scores + here * n_rows + row, total, is_row)


@triton.jit
def _ordered(x, BITS: tl.constexpr):
    """Integers from 0 up that order as fp32 does; both zeros are one. bf16 needs the high half."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    if BITS == 16:
        key = (key >> 16).to(tl.int32)
    return key


@triton.jit
def _select(
    scores, names, best, ids, seq_lens, cu_seqlens, first_token, batch, n_rows, topk, ratio,
    n_chunks, IS_RAGGED: tl.constexpr, HAS_NAMES: tl.constexpr, KEEP: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """The `topk` highest of one chunk of a token's scores, in their order; of equal ones the first.

    All are held in registers, and the lowest score chosen is found bit by bit. What is chosen is
    named by its row, or by `names`; with KEEP its score is kept too, for a next round.
    """
    here, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = chunk * BLOCK + tl.arange(0, BLOCK)
    seen = n_rows
    if IS_RAGGED:
        token = here + first_token
        request = request_of(cu_seqlens, token, batch, BATCH).to(tl.int64)
        position = position_of(seq_lens, cu_seqlens, token.to(tl.int32), request)
        seen = tl.minimum((position + 1) // ratio, n_rows)
    is_row = row < seen
    score = tl.load(scores + here * n_rows + row, is_row, float("-inf")).to(tl.float32)
    key = tl.where(is_row, _ordered(score, BITS), -1)
    need = tl.minimum(topk, tl.sum(is_row.to(tl.int32), 0))
    least = tl.zeros((), key.dtype)
    for place in tl.static_range(BITS):
        tried = least + (1 << (BITS - 1 - place))
        least = tl.where(tl.sum((key >= tried).to(tl.int32), 0) >= need, tried, least)
    vacant = need - tl.sum((key > least).to(tl.int32), 0)
    at = (key == least).to(tl.int32)
    chosen = (key > least) | ((at != 0) & (tl.cumsum(at, 0) <= vacant))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    name = row
    if HAS_NAMES:
        name = tl.load(names + here * n_rows + row, is_row, -1)
    name = tl.where(score == float("-inf"), -1, name)
    to = (here * n_chunks + chunk) * topk
    tl.store(ids + to + place, name, chosen)
    spare = tl.arange(0, BLOCK)
    is_spare = (spare >= need) & (spare < topk)
    tl.store(ids + to + spare, tl.full((BLOCK,), -1, tl.int32), is_spare)
    if KEEP:
        tl.store(best + to + place, score, chosen)
        tl.store(best + to + spare, tl.full((BLOCK,), float("-inf"), tl.float32), is_spare)


def _choose(
    scores: torch.Tensor,
    topk: int,
    bits: int,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    first: int = 0,
    ratio: int = 1,
) -> torch.Tensor:
    """Choose [n_tokens, topk] rows, those a token sees if lengths are given; -1 behind them."""
    n_tokens, names, lens, cu = len(scores), None, seq_lens, cu_seqlens
    while True:
        n_rows = scores.shape[1]
        block = min(CHUNK, max(256, triton.next_power_of_2(n_rows), triton.next_power_of_2(topk)))
        chunks = triton.cdiv(n_rows, block)
        ids = torch.empty(n_tokens, chunks * topk, dtype=torch.int32, device=scores.device)
        best = torch.empty(ids.shape if chunks > 1 else 1, device=scores.device)
        batch = len(lens) if lens is not None else 1
        _select[(n_tokens, chunks)](
            *(scores, ids if names is None else names, best, ids),
            *(ids if lens is None else lens, ids if cu is None else cu, first, batch),
            *(n_rows, topk, ratio, chunks, lens is not None, names is not None, chunks > 1),
            *(bits, block, triton.next_power_of_2(batch)),
            num_warps=max(4, min(16, block // 512)),
        )
        if chunks == 1:
            return ids
        scores, names, lens, cu = best, ids, None, None


def index_topk(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """As the op `index_topk`: ids ascending, the same on every run."""
    topk = min(topk, scores.shape[1])
    if not len(scores) or not topk:
        return torch.empty(len(scores), topk, dtype=torch.int32, device=scores.device)
    return _choose(scores.contiguous(), topk, 32)


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
    heads, depth = (max(16, triton.next_power_of_2(size)) for size in (n_heads, dim))
    for first in range(0, n_tokens, step):
        some = min(step, n_tokens - first)
        _index_scores[(some, triton.cdiv(n_rows, ROWS * TILES))](
            *(q.contiguous(), weights.contiguous(), storage, block_table.contiguous(), scores),
            *(seq_lens, cu_seqlens, first, batch, n_heads, dim, n_rows, compress_ratio),
            *(block_table.shape[1], storage.shape[1], CODES[record]),
            *(heads, depth, ROWS, TILES, triton.next_power_of_2(batch)),
            num_warps=4,
            num_stages=2,
        )
        ids[first : first + some] = _choose(
            scores[:some], topk, 16, seq_lens, cu_seqlens, first, compress_ratio
        )
    return ids
