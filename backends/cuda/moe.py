"""Rows to the experts of one device and back: order by expert, copy, sum.

Nothing here waits for the device, so a step can be captured in a graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.ops import Group, fp8_round_trip
from v4_ascend.ops.moe import DISPATCH_GROUP

FEW = 4096  # pairs that are ordered by comparing each with all
MINE, OTHERS = 16, 256  # of a program, and of a step of it


@triton.jit
def _order(
    ids, source, group_sizes, n_pairs, n_experts, pair_programs,
    MINE: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Rows of some pairs, those before them counted; the last programs count experts' rows."""
    program = tl.program_id(0)
    if program < pair_programs:
        pair = program * MINE + tl.arange(0, MINE)
        chosen = tl.load(ids + pair, pair < n_pairs, 0)
        place = tl.zeros((MINE,), tl.int32)
        for begin in range(0, n_pairs, OTHERS):
            other = begin + tl.arange(0, OTHERS)
            theirs = tl.load(ids + other, other < n_pairs, 2147483647)
            is_less = theirs[None, :] < chosen[:, None]
            is_equal = theirs[None, :] == chosen[:, None]
            is_before = is_less | (is_equal & (other[None, :] < pair[:, None]))
            place += tl.sum(is_before.to(tl.int32), 1)
        tl.store(source + place, pair.to(tl.int64), pair < n_pairs)
    else:
        expert = (program - pair_programs) * MINE + tl.arange(0, MINE)
        count = tl.zeros((MINE,), tl.int32)
        for begin in range(0, n_pairs, OTHERS):
            other = begin + tl.arange(0, OTHERS)
            theirs = tl.load(ids + other, other < n_pairs, -1)
            count += tl.sum((theirs[None, :] == expert[:, None]).to(tl.int32), 1)
        tl.store(group_sizes + expert, count.to(tl.int64), expert < n_experts)


@triton.jit
def _gather(
    x, weights, source, rows, row_weights, dim, topk,
    HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(source + row)
    from_x, to = x + pair // topk * dim, rows + row * dim
    for begin in range(0, dim, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        tl.store(to + cols, tl.load(from_x + cols, cols < dim, 0.0), cols < dim)
    if HAS_WEIGHTS:
        tl.store(row_weights + row, tl.load(weights + pair))


@triton.jit
def _invert(source, row_of, n, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(source + row, row < n, 0)
    tl.store(row_of + pair, row, row < n)


@triton.jit
def _sum_choices(rows, row_of, out, dim, topk, BLOCK: tl.constexpr):
    """Sum a token's rows in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(topk):
        row = tl.load(row_of + token * topk + choice).to(tl.int64)
        total += tl.load(rows + row * dim + cols, cols < dim, 0.0).to(tl.float32)
    tl.store(out + token * dim + cols, total, cols < dim)


def _ordered(ids: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `source` and `group_sizes` as `moe_permute`."""
    flat = ids.flatten()
    n = len(flat)
    if n > FEW:
        found = flat.sort(stable=True)
        edges = torch.arange(n_experts + 1, device=ids.device)
        return found.indices, torch.searchsorted(found.values, edges).diff()
    source = torch.empty_like(flat)
    group_sizes = flat.new_zeros(n_experts)
    if n:
        programs = triton.cdiv(n, MINE)
        _order[(programs + triton.cdiv(n_experts, MINE),)](
            flat, source, group_sizes, n, n_experts, programs, MINE, OTHERS
        )
    return source, group_sizes


def _taken(
    x: torch.Tensor, weights: torch.Tensor | None, source: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each pair's row of `x` and its weight, if there are weights."""
    (n, dim), x = (len(source), x.shape[-1]), x.contiguous()
    rows = x.new_empty(n, dim)
    row_weights = weights.new_empty(n) if weights is not None else rows
    if n:
        given = weights.contiguous() if weights is not None else x
        block = min(2048, triton.next_power_of_2(dim))
        _gather[(n,)](*(x, given, source, rows, row_weights, dim, topk, weights is not None, block))
    return rows, row_weights


def moe_permute(
    x: torch.Tensor, ids: torch.Tensor, n_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op `moe_permute`."""
    source, group_sizes = _ordered(ids, n_experts)
    return _taken(x, None, source, ids.shape[1])[0], group_sizes, source


def moe_unpermute(rows: torch.Tensor, source: torch.Tensor, topk: int) -> torch.Tensor:
    """As the op `moe_unpermute`."""
    n, dim = rows.shape
    out = torch.empty(n // topk, dim, device=rows.device)
    if not n:
        return out
    row_of = torch.empty(n, dtype=torch.int32, device=rows.device)
    _invert[(triton.cdiv(n, 1024),)](source, row_of, n, 1024)
    block = min(1024, triton.next_power_of_2(dim))
    _sum_choices[(n // topk, triton.cdiv(dim, block))](
        rows.contiguous(), row_of, out, dim, topk, block
    )
    return out


def moe_dispatch(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op `moe_dispatch`, in a group of one rank."""
    source, group_sizes = _ordered(ids, n_experts)
    x = fp8_round_trip(x, DISPATCH_GROUP, 0) if fp8 else x
    rows, row_weights = _taken(x, weights, source, ids.shape[1])
    return rows, row_weights, group_sizes, source, torch.tensor([len(x)])


def moe_combine(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> torch.Tensor:
    """As the op `moe_combine`, in a group of one rank."""
    return moe_unpermute(rows, source, topk)
