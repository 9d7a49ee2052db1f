"""Token-wise compression in three launches: a product of bf16, the rows, the state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends import prepared
from v4_ascend.backends.cuda.gemm import DEPTH, joined, split
from v4_ascend.backends.cuda.limits import BOTH_NARROW
from v4_ascend.backends.cuda.ragged import position_of, request_of


@triton.jit
def _bf16_gemm(
    a, b, out, m, n, k, steps, one,
    IS_EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile [BN, BM] of the product's transpose in fp32, over one part of the depth.

    A tensor core's sum is cut, not rounded, at each addition: apart for 128 channels, it is
    as close as a sum of fp32.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    is_row, is_col = row < m, col < n
    each = tl.arange(0, BK)
    first = tl.program_id(2) * steps
    x_at = a + row.to(tl.int64)[None, :] * k + each[:, None]
    w_at = b + col.to(tl.int64)[:, None] * k + each[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(k, BK))):
        if IS_EVEN:
            w = tl.load(w_at + step * BK, is_col[:, None], 0.0)
            x = tl.load(x_at + step * BK, is_row[None, :], 0.0)
        else:
            inside = step * BK + each < k
            w = tl.load(w_at + step * BK, is_col[:, None] & inside[None, :], 0.0)
            x = tl.load(x_at + step * BK, is_row[None, :] & inside[:, None], 0.0)
        acc += tl.dot(w, x) * one  # without it Triton makes one long sum of all products
    at = out + (tl.program_id(2) * m + row.to(tl.int64)[None, :]) * n + col[:, None]
    tl.store(at, acc, is_row[None, :] & is_col[:, None])


def _projected(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a . b^T in fp32, of bf16 [m, k] and [n, k]."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, device=a.device)
    bm, bn, parts, steps = split(m, n, triton.cdiv(k, DEPTH), a.device)
    partial = out if parts == 1 else torch.empty(parts, m, n, device=a.device)
    _bf16_gemm[(triton.cdiv(m, bm), triton.cdiv(n, bn), parts)](
        *(a.contiguous(), b, partial, m, n, k, steps, 1.0, k % DEPTH == 0, bm, bn, DEPTH),
        num_warps=4,
        num_stages=3,
    )
    return joined(partial, out)


@triton.jit
def _pool(
    new, state, slots, seq_lens, cu_seqlens, ape, norm_weight, cos, sin, rows,
    batch, width, dim, ratio, state_rows, pairs, eps,
    OVERLAPS: tl.constexpr, BATCH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Row r of the step: weigh its group's tokens per channel, norm, rotate."""
    r = tl.program_id(0)
    each = tl.arange(0, BATCH)
    is_request = each < batch
    begins = tl.load(cu_seqlens + each, is_request, 0)
    lens = tl.load(seq_lens + each, is_request, 0)
    starts = lens - (tl.load(cu_seqlens + each + 1, is_request, 0) - begins)
    ends = tl.cumsum(lens // ratio - starts // ratio, 0)  # rows up to and including each request's
    request = tl.sum(((ends <= r) & is_request).to(tl.int32), 0)
    cols = tl.arange(0, DIM)
    mask = cols < dim
    out = rows + r.to(tl.int64) * dim
    if request >= batch:
        tl.store(out + cols, tl.zeros((DIM,), rows.dtype.element_ty), mask)
    else:
        before = tl.max(tl.where(each < request, ends, 0), 0)
        begin = tl.sum(tl.where(each == request, begins, 0), 0)
        start = tl.sum(tl.where(each == request, starts, 0), 0)
        group = start // ratio + (r - before)
        slot = tl.load(slots + request)
        top = tl.full((DIM,), float("-inf"), tl.float32)
        total = tl.zeros((DIM,), tl.float32)
        acc = tl.zeros((DIM,), tl.float32)
        # The previous group gives the first half of its channels, the own one the second.
        first = (group - 1) * ratio if OVERLAPS else group * ratio
        for token in range(tl.maximum(first, 0), (group + 1) * ratio):
            at = tl.where(token >= group * ratio, width - dim, 0) + cols
            is_new = token >= start
            fresh = new + (begin + token - start).to(tl.int64) * 2 * width
            carried = state + (slot * state_rows + token % state_rows) * 2 * width
            kv = tl.load(fresh + at, mask & is_new, 0.0)
            kv += tl.load(carried + at, mask & (token < start), 0.0)
            score = tl.load(fresh + width + at, mask & is_new, 0.0)
            score += tl.load(ape + token % ratio * width + at, mask & is_new, 0.0)
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
        y = y.to(rows.dtype.element_ty).to(tl.float32)
        even, odd = tl.split(tl.reshape(y, (DIM // 2, 2)))
        pair = tl.arange(0, DIM // 2) - (dim // 2 - pairs)
        turned = (pair >= 0) & (pair < pairs)
        c = tl.load(cos + r * pairs + pair, turned, 1.0)
        s = tl.load(sin + r * pairs + pair, turned, 0.0)
        y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (DIM,))
        tl.store(out + cols, y.to(rows.dtype.element_ty), mask)


@triton.jit
def _carry(
    new, state, slots, seq_lens, cu_seqlens, ape, batch, width, ratio, state_rows,
    BATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep a token if it is among its request's last ones."""
    token = tl.program_id(0)
    request = request_of(cu_seqlens, token, batch, BATCH)
    position = position_of(seq_lens, cu_seqlens, token, request)
    if position >= tl.load(seq_lens + request) - state_rows:
        slot = tl.load(slots + request)
        cols = tl.arange(0, BLOCK)
        mask, is_score = cols < 2 * width, (cols >= width) & (cols < 2 * width)
        values = tl.load(new + token.to(tl.int64) * 2 * width + cols, mask)
        values += tl.load(ape + position % ratio * width + cols - width, is_score, 0.0)
        at = (slot * state_rows + position % state_rows) * 2 * width
        tl.store(state + at + cols, values, mask)


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
    """As the op `compress_kv`, of bf16 and weights that were bf16."""
    (n_tokens, _), batch = x.shape, len(seq_lens)
    dim, width = norm_weight.shape[0], ape.shape[1]
    rows = torch.zeros(cos.shape[0], dim, dtype=x.dtype, device=x.device)
    if not n_tokens:
        return rows, state
    new = _projected(x, prepared.get(wkv, BOTH_NARROW))
    wide = triton.next_power_of_2(batch)
    if len(rows):
        _pool[(len(rows),)](
            *(new, state, state_slots, seq_lens, cu_seqlens, ape, norm_weight),
            *(cos.contiguous(), sin.contiguous(), rows, batch, width, dim, compress_ratio),
            *(state.shape[1], cos.shape[1], norm_eps, width == 2 * dim, wide),
            triton.next_power_of_2(dim),
        )
    _carry[(n_tokens,)](
        *(new, state, state_slots, seq_lens, cu_seqlens, ape, batch, width, compress_ratio),
        *(state.shape[1], wide, triton.next_power_of_2(2 * width)),
    )
    return rows, state
