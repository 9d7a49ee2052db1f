"""Token-wise compression: whole groups of a step, and the state it leaves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from v4_ascend.backends.triton.ragged import locate
from v4_ascend.backends.triton.rows import rope


@triton.jit
def _pool(
    new, state, slots, seq_lens, cu_seqlens, ends, norm_weight, rows,
    batch, width, dim, ratio, state_rows, eps,
    OVERLAPS: tl.constexpr, BATCH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Row r of the step: weigh its group's tokens per channel, then norm."""
    r = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BATCH)
    # Requests whose rows all lie before r; `ends` counts rows up to and including each.
    end = tl.load(ends + each, each < batch, 0)
    request = tl.sum(((end <= r) & (each < batch)).to(tl.int32), 0)
    if request < batch:
        before = tl.max(tl.where(each < request, end, 0), 0)
        begin = tl.load(cu_seqlens + request)
        start = tl.load(seq_lens + request) - (tl.load(cu_seqlens + request + 1) - begin)
        group = start // ratio + (r - before)
        slot = tl.load(slots + request)
        cols = tl.arange(0, DIM)
        mask = cols < dim
        top = tl.full((DIM,), float("-inf"), tl.float32)
        total = tl.zeros((DIM,), tl.float32)
        acc = tl.zeros((DIM,), tl.float32)
        # The previous group gives the first half of its channels, the own one the second.
        first = (group - 1) * ratio if OVERLAPS else group * ratio
        for token in range(tl.maximum(first, 0), (group + 1) * ratio):
            half = tl.where(token >= group * ratio, width - dim, 0)
            is_new = token >= start
            fresh = new + (begin + token - start) * 2 * width
            carried = state + (slot * state_rows + token % state_rows) * 2 * width
            at = half + cols
            kv = tl.load(fresh + at, mask & is_new, 0.0)
            kv += tl.load(carried + at, mask & (token < start), 0.0)
            score = tl.load(fresh + width + at, mask & is_new, 0.0)
            score += tl.load(carried + width + at, mask & (token < start), 0.0)
            new_top = tl.maximum(top, score)
            p, shrink = tl.exp(score - new_top), tl.exp(top - new_top)
            total = total * shrink + p
            acc = acc * shrink + p * kv
            top = new_top
        y = (acc / total).to(rows.dtype.element_ty).to(tl.float32)
        y = tl.where(mask, y, 0.0)
        y *= tl.rsqrt(tl.sum(y * y, 0) / dim + eps)
        y *= tl.load(norm_weight + cols, mask, 0.0)
        tl.store(rows + r * dim + cols, y.to(rows.dtype.element_ty), mask)


@triton.jit
def _carry(
    new, state, slots, requests, positions, seq_lens, width2, state_rows, BLOCK: tl.constexpr
):  # fmt: skip
    """Keep a token if it is among its request's last ones."""
    token = tl.program_id(0).to(tl.int64)
    request = tl.load(requests + token)
    position = tl.load(positions + token)
    if position >= tl.load(seq_lens + request) - state_rows:
        slot = tl.load(slots + request)
        cols = tl.arange(0, BLOCK)
        mask = cols < width2
        values = tl.load(new + token * width2 + cols, mask)
        tl.store(state + (slot * state_rows + position % state_rows) * width2 + cols, values, mask)


def compress_kv(
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
    """As the op `compress_kv`; the two projections are fp32 products of torch."""
    n_tokens, batch = len(x), len(seq_lens)
    dim, width = norm_weight.shape[0], ape.shape[1]
    rows = torch.zeros(cos.shape[0], dim, dtype=x.dtype, device=x.device)
    if not n_tokens:
        return rows, state
    request, position = locate(n_tokens, seq_lens, cu_seqlens)
    wide = x.float()
    score = F.linear(wide, wgate) + ape[(position % compress_ratio).long()]
    new = torch.cat((F.linear(wide, wkv), score), dim=-1)
    starts = seq_lens - cu_seqlens.diff()
    ends = (seq_lens // compress_ratio - starts // compress_ratio).cumsum(0)
    slots = state_slots.contiguous()
    if len(rows):
        _pool[(len(rows),)](
            *(new, state, slots, seq_lens, cu_seqlens, ends, norm_weight, rows),
            *(batch, width, dim, compress_ratio, state.shape[1], norm_eps, width == 2 * dim),
            *(triton.next_power_of_2(batch), triton.next_power_of_2(dim)),
        )
    _carry[(n_tokens,)](
        *(new, state, slots, request, position, seq_lens, 2 * width, state.shape[1]),
        triton.next_power_of_2(2 * width),
    )
    return rope(rows, cos, sin), state
