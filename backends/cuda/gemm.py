"""Products with FP8 and FP4 weights on tensor cores.

Weights are the left operand: a step that decodes has few rows, and the hardware's tiles are at
least 64 of the left side but only 8 of the right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.cuda.device import n_processors
from v4_ascend.backends.triton.quant import e8m0_to_float

DEPTH = 128  # channels of one activation scale, and of a step
FP4, BF16 = tl.constexpr("e2m1"), tl.constexpr("bf16")
# Nibbles s e e m of four bytes to bytes s 0 0 e e m 0 0: low ones into $0, high ones into $1.
FOUR_PAIRS = tl.constexpr("""{
.reg .b32 sign, rest;
shl.b32 sign, $2, 4;
and.b32 sign, sign, 0x80808080;
shl.b32 rest, $2, 2;
lop3.b32 $0, rest, 0x1C1C1C1C, sign, 0xEA;
and.b32 sign, $2, 0x80808080;
shr.u32 rest, $2, 2;
lop3.b32 $1, rest, 0x1C1C1C1C, sign, 0xEA;
}""")


@triton.jit
def _fp8_gemm(
    a, a_scale, b, b_scale, out, m, n, k, steps, scale_cols,
    IS_E8M0: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile [BN, BM] of the product's transpose, over one part of the depth.

    FP8 products are summed in the tensor core for 128 channels only: its sums are short.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    is_row, is_col = row < m, col < n
    each = tl.arange(0, BK)
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, k // BK)
    x_at = a + row.to(tl.int64)[None, :] * k + each[:, None]
    w_at = b + col.to(tl.int64)[:, None] * k + each[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    x_scale_at = a_scale + row * (k // BK)
    scale_at = b_scale + tl.program_id(1) * BN // 128 * scale_cols
    x_scale, scale = tl.load(x_scale_at + first, is_row, 0), tl.load(scale_at + first)
    for step in range(first, last):
        ahead = tl.minimum(step + 1, last - 1)
        next_x_scale, next_scale = tl.load(x_scale_at + ahead, is_row, 0), tl.load(scale_at + ahead)
        w = tl.load(w_at + step * BK, is_col[:, None], 0.0)
        x = tl.load(x_at + step * BK, is_row[None, :], 0.0)
        both = e8m0_to_float(x_scale)
        if IS_E8M0:
            both *= e8m0_to_float(scale)
        else:
            both *= scale
        acc += tl.dot(w, x) * both[None, :]
        x_scale, scale = next_x_scale, next_scale
    at = out + (tl.program_id(2) * m + row.to(tl.int64)[None, :]) * n + col[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), is_row[None, :] & is_col[:, None])


@triton.jit
def _sum_parts(parts, out, n_parts, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(n_parts):
        total += tl.load(parts + part * size + at, mask, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


def fp8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As the op `fp8_gemm`, into bf16."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not m:
        return out
    bm, bn, parts, steps = split(m, n, k // DEPTH, a.device)
    is_e8m0 = b_scale.dtype == torch.float8_e8m0fnu
    partial = out if parts == 1 else torch.empty(parts, m, n, device=a.device)
    _fp8_gemm[(triton.cdiv(m, bm), triton.cdiv(n, bn), parts)](
        *(a.contiguous(), a_scale.contiguous().view(torch.uint8), b.contiguous()),
        b_scale.contiguous().view(torch.uint8) if is_e8m0 else b_scale.contiguous(),
        *(partial, m, n, k, steps, b_scale.shape[-1], is_e8m0, bm, bn, DEPTH),
        num_warps=4,
        num_stages=3,
    )
    return joined(partial, out)


def split(m: int, n: int, depth: int, device: torch.device) -> tuple[int, int, int, int]:
    """Return a tile's rows and columns, and the parts of the depth with the steps of each.

    So few columns do not keep the device busy: parts of the depth are summed apart.
    """
    bm, bn = min(64, max(16, triton.next_power_of_2(m))), 64 if m <= 32 else 128
    if m >= 1024:
        bm, bn = 128, 64
    tiles = triton.cdiv(m, bm) * triton.cdiv(n, bn)
    parts = min(depth, max(1, 2 * n_processors(device) // tiles))
    steps = triton.cdiv(depth, parts)
    return bm, bn, triton.cdiv(depth, steps), steps


def joined(partial: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return `out`, the sum of its parts [n_parts, m, n] if it is not itself the only one."""
    if partial is not out:
        size, block = out.numel(), 1024
        grid = (triton.cdiv(size, block),)
        _sum_parts[grid](partial, out, len(partial), size, block)
    return out


@triton.jit
def _map_tiles(group_sizes, tile_expert, tile_row, tile_end, n_experts, n_tiles, BM: tl.constexpr,
               EXPERTS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Expert, first row and end row of each tile; spare tiles have no rows."""
    expert = tl.arange(0, EXPERTS)
    size = tl.load(group_sizes + expert, expert < n_experts, 0).to(tl.int32)
    n = (size + BM - 1) // BM
    tile_ends, row_ends = tl.cumsum(n, 0), tl.cumsum(size, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    is_before = (tile_ends[None, :] <= tile[:, None]) & (expert < n_experts)[None, :]
    mine = tl.sum(is_before.to(tl.int32), 1)
    before = tl.max(tl.where(is_before, tile_ends[None, :], 0), 1)
    start = tl.max(tl.where(is_before, row_ends[None, :], 0), 1)
    is_mine = expert[None, :] == mine[:, None]
    end = start + tl.sum(tl.where(is_mine, size[None, :], 0), 1)
    inside = tile < n_tiles
    tl.store(tile_expert + tile, tl.minimum(mine, n_experts - 1), inside)
    tl.store(tile_row + tile, start + (tile - before) * BM, inside)
    tl.store(tile_end + tile, end, inside)


@triton.jit
def _widen(x, x_scale, out, n_groups, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """FP8 times its power of two, exact in bf16."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    mask = group < n_groups
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    scale = e8m0_to_float(tl.load(x_scale + group, mask, 0))
    wide = tl.load(x + at, mask[:, None], 0.0).to(tl.float32) * scale[:, None]
    tl.store(out + at, wide.to(tl.bfloat16), mask[:, None])


@triton.jit
def _part_pairs(x, out, n_groups, GROUPS: tl.constexpr):
    """Of each 32 channels the even ones first, then the odd: as FP4 pairs come out of bytes."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    each = tl.arange(0, 32)
    mask = (group < n_groups)[:, None]
    byte = tl.load(x + group[:, None] * 32 + each[None, :], mask, 0)
    even, odd = byte.reshape(GROUPS, 16, 2).split()
    both = tl.join(even, odd).permute(0, 2, 1).reshape(GROUPS, 32)
    tl.store(out + group[:, None] * 32 + each[None, :], both, mask)


@triton.jit
def _fp4_to_fp8(pairs, ROWS: tl.constexpr):
    """Bytes [ROWS, 16] of FP4 pairs to E4M3 [ROWS, 32], even channels first; 64 times too small.

    Sign, exponent and mantissa bits of E2M1 are those of E4M3 with another bias, subnormal
    values too: four bytes at once need seven instructions.
    """
    even, odd = tl.inline_asm_elementwise(
        FOUR_PAIRS, "=r,=r,r", [pairs], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
    )
    both = tl.join(even, odd).permute(0, 2, 1).reshape(ROWS, 32)
    return both.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _grouped_fp4(
    x, x_scale, weight, weight_scale, out, tile_expert, tile_row, tile_end, n, k,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tile [BN, BM] of the transpose of one expert's product; `x` as `_part_pairs` leaves it.

    Products of 32 channels, which have one scale of the weight, are summed in the tensor core;
    four of them have one scale of `x`. Scales are loaded a step ahead: nothing else would hide
    how long they take.
    """
    tile = tl.program_id(1)
    begin, end = tl.load(tile_row + tile), tl.load(tile_end + tile)
    if begin < end:
        expert = tl.load(tile_expert + tile).to(tl.int64)
        row = begin + tl.arange(0, BM)
        col = tl.program_id(0) * BN + tl.arange(0, BN)
        is_row, is_col = row < end, col < n
        b_row = expert * n + col
        byte, each = tl.arange(0, 16), tl.arange(0, 32)
        w_at = weight + b_row[:, None] * (k // 2) + byte[None, :]
        s_at = weight_scale + b_row * (k // 128)  # four in an integer
        x_at = x + row.to(tl.int64)[None, :] * k + each[:, None]
        x_scale_at = x_scale + row.to(tl.int64) * (k // 128)
        acc = tl.zeros((BN, BM), tl.float32)
        steps = k // 128
        scales, x_scales = tl.load(s_at, is_col, 0), tl.load(x_scale_at, is_row, 0)
        for step in range(0, steps):
            has_next = step + 1 < steps
            next_scales = tl.load(s_at + step + 1, is_col & has_next, 0)
            next_x_scales = tl.load(x_scale_at + step + 1, is_row & has_next, 0)
            some = tl.zeros((BN, BM), tl.float32)
            for group in tl.static_range(4):
                pairs = tl.load(w_at + step * 64 + group * 16, is_col[:, None], 0)
                rows = tl.load(x_at + step * 128 + group * 32, is_row[None, :], 0.0)
                scale = e8m0_to_float((scales >> (8 * group)) & 255)
                some += tl.dot(_fp4_to_fp8(pairs, BN), rows) * scale[:, None]
            acc += some * (e8m0_to_float(x_scales) * 64.0)[None, :]
            scales, x_scales = next_scales, next_x_scales
        at = out + row.to(tl.int64)[None, :] * n + col[:, None]
        tl.store(at, acc.to(out.dtype.element_ty), is_row[None, :] & is_col[:, None])


@triton.jit
def _grouped_wide(
    x, weight, weight_scale, out, tile_expert, tile_row, tile_end, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BN] of one expert's product with rows in bf16, as `_widen` leaves them.

    A weight times its scale is exact in bf16: many rows share that, and sums need no mending.
    """
    tile = tl.program_id(1)
    begin, end = tl.load(tile_row + tile), tl.load(tile_end + tile)
    if begin < end:
        expert = tl.load(tile_expert + tile).to(tl.int64)
        row = begin + tl.arange(0, BM)
        col = tl.program_id(0) * BN + tl.arange(0, BN)
        is_row, is_col = row < end, col < n
        b_row = expert * n + col
        each, half, group = tl.arange(0, BK), tl.arange(0, BK // 2), tl.arange(0, BK // 32)
        w_at = weight + b_row[:, None] * (k // 2) + half[None, :]
        s_at = weight_scale + b_row[:, None] * (k // 32) + group[None, :]
        x_at = x + row.to(tl.int64)[:, None] * k + each[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, k // BK):
            w = tl.load(w_at + step * (BK // 2), is_col[:, None], 0)
            scale = tl.load(s_at + step * (BK // 32), is_col[:, None], 0)
            rows = tl.load(x_at + step * BK, is_row[:, None], 0.0)
            acc = tl.dot_scaled(rows, None, BF16, tl.trans(w), scale, FP4, acc, fast_math=True)
        at = out + row.to(tl.int64)[:, None] * n + col[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), is_row[:, None] & is_col[None, :])


def grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As the op `grouped_gemm` into bf16, with FP4 weights; with FP8 ones of a single expert."""
    if x_scale is None or weight_scale is None:
        raise ValueError("this kernel multiplies quantised weights")
    if weight.dtype != torch.int8:
        return fp8_gemm(x, x_scale, weight[0], weight_scale[0], out_dtype)
    (m, k), (n_experts, n, _) = x.shape, weight.shape
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if not m:
        return out
    bm = 16 if m <= 8 * n_experts else 32 if m <= 32 * n_experts else 128
    bn, n_tiles = 128, min(m, m // bm + n_experts)  # bounded by shapes alone: nothing waits
    tiles = torch.empty(3, n_tiles, dtype=torch.int32, device=x.device)
    expert, row, end = tiles.unbind()
    _map_tiles[(triton.cdiv(n_tiles, 64),)](
        *(group_sizes, expert, row, end, n_experts, n_tiles, bm),
        *(triton.next_power_of_2(n_experts), 64),
    )
    grid = (triton.cdiv(n, bn), n_tiles)
    x, x_scale = x.contiguous(), x_scale.contiguous().view(torch.uint8)
    weight, weight_scale = weight.contiguous().view(torch.uint8), weight_scale.contiguous()
    if bm < 128:
        parted, n_groups, groups = torch.empty_like(x), m * k // 32, 64
        _part_pairs[(triton.cdiv(n_groups, groups),)](
            x.view(torch.uint8), parted.view(torch.uint8), n_groups, groups
        )
        _grouped_fp4[grid](
            *(parted, x_scale, weight, weight_scale.view(torch.int32), out),
            *(expert, row, end, n, k, bm, bn),
            num_warps=4,
            num_stages=3,
        )
    else:
        wide = torch.empty(m, k, dtype=torch.bfloat16, device=x.device)
        n_groups, groups = m * k // DEPTH, 16
        _widen[(triton.cdiv(n_groups, groups),)](x, x_scale, wide, n_groups, groups, DEPTH)
        _grouped_wide[grid](
            *(wide, weight, weight_scale.view(torch.uint8), out),
            *(expert, row, end, n, k, bm, bn, 32),
            num_warps=8,
            num_stages=3,
        )
    return out
