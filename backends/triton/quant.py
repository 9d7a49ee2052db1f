"""FP8 e4m3, FP4 e2m1 and E8M0 by their bits: the same bytes as the reference, on any device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.ops.formats import E8M0, FP8
from v4_ascend.ops.gemm import ACT_GROUP


@triton.jit
def ceil_to_e8m0(x):
    """Byte of the smallest power of two not below positive x."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)


@triton.jit
def inverse_of_e8m0(byte):
    """2^-(byte - 127) in fp32, for bytes 1..253."""
    return ((254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_to_float(byte):
    """2^(byte - 127) in fp32; byte 0 is subnormal there."""
    byte = byte.to(tl.int32)
    return tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def float_to_e4m3(x):
    """Nearest e4m3 byte of fp32 within +-448, ties to even, as int32."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    normal -= 120 << 3  # exponent bias 127 to 7
    # Below 2^-6 steps are 2^-9 wide; adding 2^23 rounds to integers.
    steps = magnitude.to(tl.float32, bitcast=True) * 512.0 + 8388608.0
    subnormal = steps.to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return sign | tl.minimum(code, 0x7E)


@triton.jit
def e4m3_to_half(byte):
    """Value of an e4m3 byte in fp16, exact: its bits, shifted, are those of value / 256."""
    byte = byte.to(tl.int16)
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def e2m1_to_float(code):
    """Value in fp32 of an e2m1 code 0..15."""
    code = code.to(tl.int32)
    mantissa, exponent = code & 1, (code >> 1) & 3
    # Codes 0 and 1 are 0 and 0.5; the others are (1 + m / 2) 2^(e - 1).
    bits = ((exponent + 126) << 23) | (mantissa << 22)
    magnitude = tl.where(exponent == 0, mantissa * 0.5, bits.to(tl.float32, bitcast=True))
    return tl.where((code & 8) != 0, -magnitude, magnitude)


@triton.jit
def float_to_e2m1(x):
    """Nearest e2m1 code of fp32, ties to the even code, saturating; keeps the sign of zero."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    code += (a > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def fp8_scale_byte(amax):
    """E8M0 byte under which a group of this largest magnitude fits e4m3."""
    return ceil_to_e8m0(tl.maximum(amax, 1e-4) * (1.0 / 448.0))


@triton.jit
def fp4_scale_byte(amax):
    """E8M0 byte under which a group of this largest magnitude fits e2m1.

    ceil_to_e8m0(amax / 6) without a division: 6 is 1.5 * 4.
    """
    bits = tl.maximum(amax, 7.052966104933725e-38).to(tl.int32, bitcast=True)  # 6 * 2^-126
    return (bits >> 23) - 2 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)


@triton.jit
def _act_quant(x, values, scales, n_groups, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = group < n_groups
    wide = tl.load(x + at, mask[:, None], 0.0).to(tl.float32)
    byte = fp8_scale_byte(tl.max(tl.abs(wide), 1))
    code = float_to_e4m3(wide * inverse_of_e8m0(byte)[:, None])
    tl.store(values + at, code.to(tl.uint8), mask[:, None])
    tl.store(scales + group, byte.to(tl.uint8), mask)


def act_quant(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op `act_quant`."""
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = values.new_empty(*x.shape[:-1], x.shape[-1] // group_size)
    if n_groups := scales.numel():
        groups = 16
        grid = (triton.cdiv(n_groups, groups),)
        _act_quant[grid](x, values, scales, n_groups, groups, group_size)
    return values.view(FP8), scales.view(E8M0)


@triton.jit
def _fp4_act_quant(x, values, scales, n_groups, GROUPS: tl.constexpr, HALF: tl.constexpr):
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    at = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
    mask = (group < n_groups)[:, None]
    low = tl.load(x + 2 * at, mask, 0.0).to(tl.float32)
    high = tl.load(x + 2 * at + 1, mask, 0.0).to(tl.float32)
    byte = fp4_scale_byte(tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1)))
    inverse = inverse_of_e8m0(byte)[:, None]
    code = float_to_e2m1(low * inverse) | (float_to_e2m1(high * inverse) << 4)
    tl.store(values + at, code.to(tl.uint8), mask)
    tl.store(scales + group, byte.to(tl.uint8), group < n_groups)


def fp4_act_quant(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op `fp4_act_quant`."""
    x = x.contiguous()
    values = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    scales = values.new_empty(*x.shape[:-1], x.shape[-1] // group_size)
    if n_groups := scales.numel():
        groups = 16
        grid = (triton.cdiv(n_groups, groups),)
        _fp4_act_quant[grid](x, values, scales, n_groups, groups, group_size // 2)
    return values.view(torch.int8), scales.view(E8M0)


@triton.jit
def _fp8_round_trip(
    x, out, n_groups, per_row, n, n_rounded, GROUPS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    col = (group % per_row)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    at = (group // per_row)[:, None] * n + col
    mask = (group < n_groups)[:, None] & (col < n)
    wide = tl.load(x + at, mask, 0.0).to(tl.float32)
    byte = fp8_scale_byte(tl.max(tl.abs(wide), 1))
    code = float_to_e4m3(wide * inverse_of_e8m0(byte)[:, None])
    back = e4m3_to_half(code).to(tl.float32) * e8m0_to_float(byte)[:, None]
    tl.store(out + at, tl.where(col < n_rounded, back, wide).to(out.dtype.element_ty), mask)


def fp8_round_trip(x: torch.Tensor, group_size: int, n_kept: int) -> torch.Tensor:
    """As the op `fp8_round_trip`."""
    x = x.contiguous()
    out, n = torch.empty_like(x), x.shape[-1]
    if x.numel():
        per_row, groups = triton.cdiv(n, group_size), 16
        n_groups = x.numel() // n * per_row
        _fp8_round_trip[(triton.cdiv(n_groups, groups),)](
            x, out, n_groups, per_row, n, n - n_kept, groups, group_size
        )
    return out


@triton.jit
def _fp4_round_trip(x, out, n_groups, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = (group < n_groups)[:, None]
    wide = tl.load(x + at, mask, 0.0).to(tl.float32)
    byte = fp4_scale_byte(tl.max(tl.abs(wide), 1))
    code = float_to_e2m1(wide * inverse_of_e8m0(byte)[:, None])
    back = e2m1_to_float(code) * e8m0_to_float(byte)[:, None]
    tl.store(out + at, back.to(out.dtype.element_ty), mask)


def fp4_round_trip(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """As the op `fp4_round_trip`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if n_groups := x.numel() // group_size:
        groups = 16
        _fp4_round_trip[(triton.cdiv(n_groups, groups),)](x, out, n_groups, groups, group_size)
    return out


@triton.jit
def _swiglu_act_quant(
    x, weight, values, scales, inter_dim, limit,
    HAS_WEIGHT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """As `_swiglu` and `_act_quant`: the activation is rounded to the dtype of x in between."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    n_groups = inter_dim // SIZE
    mask = (group < n_groups)[:, None]
    cols = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    at = x + row * 2 * inter_dim + cols
    gate = tl.minimum(tl.load(at, mask, 0.0).to(tl.float32), limit)
    up = tl.load(at + inter_dim, mask, 0.0).to(tl.float32)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    y = gate / (1.0 + tl.exp(-gate)) * up
    if HAS_WEIGHT:
        y *= tl.load(weight + row)
    y = y.to(x.dtype.element_ty).to(tl.float32)
    byte = fp8_scale_byte(tl.max(tl.abs(y), 1))
    code = float_to_e4m3(y * inverse_of_e8m0(byte)[:, None])
    tl.store(values + row * inter_dim + cols, code.to(tl.uint8), mask)
    tl.store(scales + row * n_groups + group, byte.to(tl.uint8), group < n_groups)


def swiglu_act_quant(
    x: torch.Tensor, limit: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op `swiglu_act_quant`."""
    x = x.contiguous()
    n_rows, inter_dim = x.shape[0], x.shape[1] // 2
    values = torch.empty(n_rows, inter_dim, dtype=torch.uint8, device=x.device)
    scales = values.new_empty(n_rows, inter_dim // ACT_GROUP)
    if n_rows:
        groups = 8
        factors = x if weight is None else weight.contiguous()
        _swiglu_act_quant[(n_rows, triton.cdiv(scales.shape[1], groups))](
            x, factors, values, scales, inter_dim, limit, weight is not None, groups, ACT_GROUP
        )
    return values.view(FP8), scales.view(E8M0)
