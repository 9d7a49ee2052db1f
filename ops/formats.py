"""Number formats of V4 checkpoints and caches: FP8 e4m3, FP4 e2m1, E8M0 scales.

An E8M0 byte b means 2^(b-127); 0xFF is NaN and there is no zero. A scale is a multiplier:
value = element * scale. FP4 packs two values a byte, the low nibble first.

Source: DeepSeek-V4 inference/kernel.py (act_quant, fp4_act_quant) and convert.py; OCP MX 1.0.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
FP8_MAX = 448.0
FP4_MAX = 6.0
INT8_MAX = 127
MX_GROUP = 32
FP8_AMAX_FLOOR = 1e-4  # kernel.py: keeps the scale of an all-zero group finite
FP4_AMAX_FLOOR = 6.0 * 2.0**-126
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1 codes 0..7; bit 3 is the sign
# Midpoints between neighbouring codes. A tie goes to the even code: down where the lower is even.
_FP4_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_FP4_TIES_UP = (0.75, 1.75, 3.5)


def ceil_to_e8m0(x: torch.Tensor) -> torch.Tensor:
    """Round positive fp32 up to a power of two, by bits: exponent + (mantissa != 0)."""
    bits = x.float().contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()
    return exponent.to(torch.uint8).view(E8M0)


def scale_to_float(scale: torch.Tensor) -> torch.Tensor:
    """Widen scales to fp32: E8M0 by its bits where torch has no conversion, which is an NPU."""
    if scale.dtype != E8M0 or scale.device.type in ("cpu", "cuda"):
        return scale.float()
    bits = scale.view(torch.uint8).int()
    # 2^-127 is subnormal in fp32, so byte 0 is not (0 << 23).
    wide = torch.where(bits == 0, 0x00400000, bits << 23)
    return torch.where(bits == 255, 0x7FC00000, wide).view(torch.float32)


def fp8_scale(amax: torch.Tensor) -> torch.Tensor:
    """E8M0 scale under which a group of this largest magnitude fits e4m3."""
    # The product with fp32(1/448), not the quotient: 448 * 2^k then gives exactly 2^k.
    return ceil_to_e8m0(amax.float().clamp_min(FP8_AMAX_FLOOR) * (1.0 / FP8_MAX))


def fp4_scale(amax: torch.Tensor) -> torch.Tensor:
    """E8M0 scale under which a group of this largest magnitude fits e2m1."""
    return ceil_to_e8m0(amax.float().clamp_min(FP4_AMAX_FLOOR) / FP4_MAX)


def round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Saturate to +-448 and round to the nearest e4m3, ties to even."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def round_to_fp4(x: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code 0..15 as uint8, ties to the even code; keeps the sign of zero."""
    magnitude = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for bound in _FP4_TIES_DOWN:
        code += magnitude > bound
    for bound in _FP4_TIES_UP:
        code += magnitude >= bound
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def fp4_value(code: torch.Tensor) -> torch.Tensor:
    """Value in fp32 of e2m1 codes 0..15."""
    return _fp4_table(code.device)[code.long()]


@cache
def _fp4_table(device: torch.device) -> torch.Tensor:
    """Return the values by code; copied once, as a copy from the host holds a device up."""
    return torch.tensor(FP4_VALUES + tuple(-v for v in FP4_VALUES), device=device)


def pack_fp4(code: torch.Tensor) -> torch.Tensor:
    """Pack codes [..., n] into int8 [..., n / 2], the even channel in the low nibble."""
    return (code[..., 0::2] | (code[..., 1::2] << 4)).view(torch.int8)


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Codes [..., 2 n] of int8 or uint8 bytes [..., n], the low nibble first."""
    byte = packed.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), dim=-1).flatten(-2)


def pack_int4_rows(value: torch.Tensor) -> torch.Tensor:
    """Pack int8 -8..7 [..., n, k] into int8 [..., n / 2, k], the even row in the low nibble."""
    return (value[..., 0::2, :] & 15) | (value[..., 1::2, :] << 4)


def unpack_int4_rows(packed: torch.Tensor) -> torch.Tensor:
    """Values as int8 [..., n, k] of int8 bytes [..., n / 2, k], the low nibble first."""
    low, high = (packed << 4) >> 4, packed >> 4  # both shifts keep the sign
    return torch.stack((low, high), dim=-2).flatten(-3, -2)


def spread_scale(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """Repeat block scales [..., ceil(o/bo), ceil(i/bi)] to fp32 [..., o, i]."""
    out_block, in_block = block
    wide = scale_to_float(scale).repeat_interleave(out_block, dim=-2)[..., : shape[-2], :]
    return wide.repeat_interleave(in_block, dim=-1)[..., : shape[-1]]


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows to int8 with one fp32 scale each, the largest magnitude by 127.

    Shapes: x [..., n] any float, return values [..., n] int8, scale [...] fp32
    """
    wide = x.float()
    scale = wide.abs().amax(-1) / INT8_MAX
    scaled = wide / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return scaled.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def quantize_fp8_block(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix to e4m3 with one E8M0 scale per `block` x `block` tile.

    Shapes:
        weight  [out, in]  any float
        return  weight [out, in] e4m3, scale [ceil(out / block), ceil(in / block)] e8m0
    """
    rows, cols = weight.shape
    padded = torch.zeros(-(-rows // block) * block, -(-cols // block) * block)
    padded[:rows, :cols] = weight
    tiles = padded.view(padded.shape[0] // block, block, -1, block)
    scale = fp8_scale(tiles.abs().amax(dim=(1, 3)))
    return round_to_fp8(weight.float() / spread_scale(scale, weight.shape, (block, block))), scale


def is_mx(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether e4m3 [..., out, in] has a scale per row and 32 channels, not per 128 x 128."""
    return scale.shape[-1] * MX_GROUP == weight.shape[-1]


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights in fp32 of e4m3 [..., out, in], in 128 x 128 blocks or MXFP8."""
    if is_mx(weight, scale):
        return dequantize_groups(weight, scale)
    return dequantize_fp8_block(weight, scale)


def dequantize_fp8_block(
    weight: torch.Tensor, scale: torch.Tensor, block: int = 128
) -> torch.Tensor:
    """Weights in fp32 of e4m3 [..., out, in] with scales per `block` x `block`."""
    return weight.float() * spread_scale(scale, weight.shape, (block, block))


def quantize_fp4(weight: torch.Tensor, group: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of a matrix to e2m1 with one E8M0 scale per `group` channels.

    Shapes:
        weight  [..., in]  any float, `in` a multiple of `group`
        return  packed [..., in / 2] int8, scale [..., in / group] e8m0
    """
    grouped = weight.float().unflatten(-1, (-1, group))
    scale = fp4_scale(grouped.abs().amax(-1))
    scaled = grouped / scale_to_float(scale).unsqueeze(-1)
    return pack_fp4(round_to_fp4(scaled.clamp(-FP4_MAX, FP4_MAX)).flatten(-2)), scale


def dequantize_fp4(packed: torch.Tensor, scale: torch.Tensor, group: int = 32) -> torch.Tensor:
    """Values in fp32 [..., in] of packed e2m1 [..., in / 2] with scales per `group` channels."""
    # The two values of a byte are looked up at once: half the time of one after the other.
    bytes_ = torch.arange(256, dtype=torch.uint8, device=packed.device)
    pairs = fp4_value(unpack_fp4(bytes_)).view(256, 2)
    value = F.embedding(packed.view(torch.uint8).int(), pairs).unflatten(-2, (-1, group // 2))
    return (value.flatten(-2) * scale_to_float(scale).unsqueeze(-1)).flatten(-2)


def dequantize_groups(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values in fp32 of e4m3 [..., n] with one scale per n / scale.shape[-1] channels."""
    grouped = value.float().unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale_to_float(scale).unsqueeze(-1)).flatten(-2)
