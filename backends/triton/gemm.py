"""Products with quantised weights, whole and by expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.triton.quant import e2m1_to_float, e4m3_to_half, e8m0_to_float

ACT_GROUP = 128  # channels per activation scale
PLAIN, FP8, FP4 = 0, 1, 2


@triton.jit
def _scale(at, mask, IS_E8M0: tl.constexpr):
    if IS_E8M0:
        scale = e8m0_to_float(tl.load(at, mask, 0))
    else:
        scale = tl.load(at, mask, 0.0)
    return scale


@triton.jit
def _fp8_step(a, b, acc, a_scale, b_scale):
    """Add one block of 128 channels; fp16 holds e4m3 exactly, scales are applied in fp32."""
    product = tl.dot(e4m3_to_half(a), tl.trans(e4m3_to_half(b)))
    return acc + product * a_scale[:, None] * b_scale[None, :]


@triton.jit
def _gemm(
    a, a_scale, b, b_scale, out, tile_expert, tile_row, tile_end,
    n, k, b_scale_rows, b_scale_cols,
    FORMAT: tl.constexpr, IS_E8M0: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one expert: out[m, n] = a[m, :] . b[expert, n, :]."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    row = (tl.load(tile_row + tile) + tl.arange(0, BM)).to(tl.int64)
    is_row = row < tl.load(tile_end + tile)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    is_col = col < n
    each = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    b_row = expert * n + col.to(tl.int64)
    if FORMAT == 0:
        for begin in range(0, k, BK):
            inside = begin + each < k
            x = tl.load(
                a + row[:, None] * k + begin + each[None, :], is_row[:, None] & inside[None, :], 0.0
            )
            w = tl.load(
                b + b_row[:, None] * k + begin + each[None, :],
                is_col[:, None] & inside[None, :],
                0.0,
            )
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    else:
        for begin in range(0, k, BK):
            x_scale = e8m0_to_float(tl.load(a_scale + row * (k // BK) + begin // BK, is_row, 0))
            if FORMAT == 1:
                x = tl.load(a + row[:, None] * k + begin + each[None, :], is_row[:, None], 0)
                w = tl.load(b + b_row[:, None] * k + begin + each[None, :], is_col[:, None], 0)
                at = (expert * b_scale_rows + col // 128) * b_scale_cols + begin // BK
                acc = _fp8_step(x, w, acc, x_scale, _scale(b_scale + at, is_col, IS_E8M0))
            else:
                # Even channels are low nibbles, odd ones high: two products of half the depth.
                half = tl.arange(0, BK // 2)
                at = a + row[:, None] * k + begin + 2 * half[None, :]
                even = e4m3_to_half(tl.load(at, is_row[:, None], 0))
                odd = e4m3_to_half(tl.load(at + 1, is_row[:, None], 0))
                packed = tl.load(
                    b + b_row[:, None] * (k // 2) + begin // 2 + half[None, :], is_col[:, None], 0
                ).to(tl.int32)
                group = b_row[:, None] * (k // 32) + begin // 32 + half[None, :] // 16
                scale = e8m0_to_float(tl.load(b_scale + group, is_col[:, None], 0))
                # e2m1 times a power of two is exact in bf16, as e4m3 is.
                low = (e2m1_to_float(packed & 15) * scale).to(tl.bfloat16)
                high = (e2m1_to_float((packed >> 4) & 15) * scale).to(tl.bfloat16)
                product = tl.dot(even.to(tl.float32).to(tl.bfloat16), tl.trans(low))
                product = tl.dot(odd.to(tl.float32).to(tl.bfloat16), tl.trans(high), product)
                acc += product * x_scale[:, None]
    at = row[:, None] * n + col[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), is_row[:, None] & is_col[None, :])


def _launch(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    n: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply rows grouped by expert with weights [n_experts, n, k]."""
    m, k = a.shape
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not m:
        return out
    fmt = PLAIN if b_scale is None else FP4 if b.dtype == torch.int8 else FP8
    bm = 16 if m <= 16 * len(group_sizes) else 64
    tiles = _tiles(group_sizes, m, bm)
    is_e8m0 = b_scale is not None and b_scale.dtype == torch.float8_e8m0fnu
    scale_rows, scale_cols = (b_scale.shape[-2:]) if b_scale is not None else (0, 0)
    grid = (len(tiles[0]), triton.cdiv(n, 64))
    _gemm[grid](
        *(_bytes(a), _bytes(a_scale, a), _bytes(b), _bytes(b_scale, b), out, *tiles),
        *(n, k, scale_rows, scale_cols, fmt, is_e8m0, bm, 64, 64 if fmt == PLAIN else ACT_GROUP),
    )
    return out


def _bytes(x: torch.Tensor | None, instead: torch.Tensor | None = None) -> torch.Tensor:
    """One-byte formats as bytes; something of the right device for what is absent."""
    if x is None:
        x = instead
    if x is None:
        raise ValueError("nothing to pass")
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _tiles(
    group_sizes: torch.Tensor, n_rows: int, bm: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expert, first row and end row of every tile; spare tiles at the end have no rows.

    The number of tiles is bounded by shapes alone, so nothing waits for the device.
    """
    n_experts = len(group_sizes)
    n_tiles = min(n_rows, n_rows // bm + n_experts)
    of_expert = (group_sizes + bm - 1) // bm
    tile_ends, row_ends = of_expert.cumsum(0), group_sizes.cumsum(0)
    tile = torch.arange(n_tiles, device=group_sizes.device)
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp_max(n_experts - 1)
    before = tile_ends[expert] - of_expert[expert]
    row = row_ends[expert] - group_sizes[expert] + (tile - before) * bm
    return expert.int(), row.int(), row_ends[expert].int()


def fp8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As the op `fp8_gemm`."""
    one = torch.full((1,), len(a), device=a.device)
    return _launch(a, a_scale, b, b_scale, one, b.shape[0], out_dtype)


def fp4_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As the op `fp4_gemm`."""
    one = torch.full((1,), len(a), device=a.device)
    return _launch(a, a_scale, b, b_scale, one, b.shape[0], out_dtype)


def grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As the op `grouped_gemm`."""
    return _launch(x, x_scale, weight, weight_scale, group_sizes, weight.shape[1], out_dtype)
