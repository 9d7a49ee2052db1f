"""The lightning indexer: scores of compressed rows, and the highest of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.triton.paged import CODES, load_rows, slots_of
from v4_ascend.backends.triton.ragged import locate


@triton.jit
def _index_scores(
    q, weights, storage, table, scores, requests, positions,
    n_heads, dim, n_rows, ratio, max_blocks, block_rows,
    RECORD: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    request = tl.load(requests + token).to(tl.int64)
    seen = (tl.load(positions + token) + 1) // ratio
    is_visible = row < seen
    out = tl.full((ROWS,), float("-inf"), tl.float32)
    if tl.program_id(1) * ROWS < seen:
        head, cols = tl.arange(0, HEADS), tl.arange(0, DIM)
        mask = (head[:, None] < n_heads) & (cols[None, :] < dim)
        at = (token * n_heads + head[:, None]) * dim + cols[None, :]
        queries = tl.load(q + at, mask, 0.0)
        slot = slots_of(table, request, row, is_visible, max_blocks, block_rows)
        keys = load_rows(storage, slot, is_visible, dim, block_rows, RECORD, DIM)
        keys = keys.to(queries.dtype)
        products = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        weight = tl.load(weights + token * n_heads + head, head < n_heads, 0.0).to(tl.float32)
        # Rounded where the published code rounds: that makes ties, and ties choose rows.
        products = tl.maximum(products, 0.0).to(queries.dtype).to(tl.float32)
        weighed = (products * weight[None, :]).to(queries.dtype).to(tl.float32)
        total = tl.sum(weighed, 1).to(queries.dtype).to(tl.float32)
        out = tl.where(is_visible, total, out)
    tl.store(scores + token * n_rows + row, out, row < n_rows)


def index_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
) -> torch.Tensor:
    """As the op `index_scores`; its width is a length, so this waits for the device once."""
    n_tokens, n_heads, dim = q.shape
    n_rows = int(seq_lens.max()) // compress_ratio if len(seq_lens) else 0
    scores = torch.empty(n_tokens, n_rows, device=q.device)
    if not scores.numel():
        return scores
    request, position = locate(n_tokens, seq_lens, cu_seqlens)
    rows = 64
    _index_scores[(n_tokens, triton.cdiv(n_rows, rows))](
        *(q.contiguous(), weights.contiguous(), storage, block_table.contiguous(), scores),
        *(request, position, n_heads, dim, n_rows, compress_ratio),
        *(block_table.shape[1], storage.shape[1], CODES[record]),
        max(16, triton.next_power_of_2(n_heads)),
        max(16, triton.next_power_of_2(dim)),
        rows,
    )
    return scores


@triton.jit
def _ordered(x):
    """Integers that order as fp32 does; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _index_topk(scores, ids, n_rows, topk, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    scores += token * n_rows
    each = tl.arange(0, BLOCK)
    # The largest threshold that at least topk rows reach, by bisection over all 32 bits.
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        reached = tl.full((), 0, tl.int32)
        for begin in range(0, n_rows, BLOCK):
            row = begin + each
            key = _ordered(tl.load(scores + row, row < n_rows, 0.0)).to(tl.int64)
            reached += tl.sum(((key >= middle) & (row < n_rows)).to(tl.int32), 0)
        enough = reached >= topk
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = tl.full((), 0, tl.int32)
    for begin in range(0, n_rows, BLOCK):
        row = begin + each
        key = _ordered(tl.load(scores + row, row < n_rows, 0.0)).to(tl.int64)
        above += tl.sum(((key > low) & (row < n_rows)).to(tl.int32), 0)
    # Rows in order: all above the threshold, and the lowest of those at it.
    written = tl.full((), 0, tl.int32)
    vacant = topk - above
    for begin in range(0, n_rows, BLOCK):
        row = begin + each
        score = tl.load(scores + row, row < n_rows, 0.0)
        key = _ordered(score).to(tl.int64)
        at = ((key == low) & (row < n_rows)).to(tl.int32)
        taken = (at != 0) & (tl.cumsum(at, 0) <= vacant)
        vacant -= tl.minimum(tl.sum(at, 0), vacant)
        chosen = (taken | ((key > low) & (row < n_rows))).to(tl.int32)
        place = written + tl.cumsum(chosen, 0) - 1
        name = tl.where(score == float("-inf"), -1, row)
        tl.store(ids + token * topk + place, name, chosen != 0)
        written += tl.sum(chosen, 0)


def index_topk(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """As the op `index_topk`: ids ascending, the same on every run."""
    n_tokens, n_rows = scores.shape
    topk = min(topk, n_rows)
    ids = torch.empty(n_tokens, topk, dtype=torch.int32, device=scores.device)
    if ids.numel():
        block = min(2048, triton.next_power_of_2(n_rows))
        _index_topk[(n_tokens,)](scores.contiguous(), ids, n_rows, topk, block)
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
    """As the op `index_select`."""
    scores = index_scores(
        q, weights, storage, record, block_table, seq_lens, cu_seqlens, compress_ratio
    )
    return index_topk(scores, topk)
