"""Number formats as the vendor's kernels store them; every function computes in fp32."""

from __future__ import annotations

import torch

FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
FP8_MAX, FP4_MAX, INT8_MAX = 448.0, 6.0, 127.0
MX_GROUP = 32
# torch_npu's numbers for formats; a torch dtype is passed as its ScalarType.
ACL_E5M2, ACL_E4M3, ACL_E8M0, ACL_FP4 = 291, 292, 293, 296
SCALAR_INT8, SCALAR_BF16, SCALAR_FP16, SCALAR_FP32, SCALAR_E4M3 = 1, 15, 5, 6, 24
SCALAR_INT32 = 3

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4_VALUES = torch.cat((_FP4, -_FP4))
# The two values of each byte, as the 8 bytes they are.
_FP4_PAIRS = torch.stack((_FP4_VALUES.repeat(16), _FP4_VALUES.repeat_interleave(16)), -1)
_FP4_PAIRS = _FP4_PAIRS.view(torch.int64).flatten()


def power_of_two_scale(largest: torch.Tensor, most: float) -> torch.Tensor:
    """Return the smallest power of two that brings `largest` within `most`."""
    return torch.exp2(torch.ceil(torch.log2(largest.clamp_min(1e-4) / most)))


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Round to e4m3, saturating."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def per_token(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows to int8 or e4m3: values and the factor per row, ``amax / max``."""
    x = x.float()
    most = INT8_MAX if dtype == torch.int8 else FP8_MAX
    scale = x.abs().amax(-1) / most
    scaled = x / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    if dtype == torch.int8:
        return torch.round(scaled).clamp(-128, 127).to(torch.int8), scale
    return to_fp8(scaled), scale


def to_fp4(x: torch.Tensor) -> torch.Tensor:
    """Round to e2m1, ties to even, and pack two codes a byte, the even channel low."""
    distance = (x.abs().clamp_max(FP4_MAX).unsqueeze(-1) - _FP4).abs()
    low = distance.min(-1).indices
    high = 7 - distance.flip(-1).min(-1).indices  # another index only at a tie
    code = torch.where(low % 2 == 0, low, high) | (torch.signbit(x).long() << 3)
    return (code[..., ::2] | (code[..., 1::2] << 4)).to(torch.uint8)


def from_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Values [..., 2 n] of bytes [..., n]."""
    byte = packed.contiguous().view(torch.uint8).int()
    pairs = _FP4_PAIRS.index_select(0, byte.flatten()).view(torch.float32)
    return pairs.view(*packed.shape[:-1], 2 * packed.shape[-1])


def mx_quant(
    x: torch.Tensor, fp4: bool, round_up: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise groups of 32 as OCP MX: values and scale bytes [..., ceil(n / 64), 2].

    The shared exponent is ``floor(log2(amax)) - emax``, so the largest value may saturate; with
    `round_up` it is the smallest that saturates nothing.
    """
    n = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -n % (2 * MX_GROUP)))
    groups = padded.unflatten(-1, (-1, MX_GROUP))
    largest = groups.abs().amax(-1).clamp_min(2.0**-126)
    if round_up:
        exponent = torch.ceil(torch.log2(largest / (FP4_MAX if fp4 else FP8_MAX)))
    else:
        exponent = torch.floor(torch.log2(largest)) - (2 if fp4 else 8)
    exponent = exponent.clamp(-127, 127)
    scaled = (groups / torch.exp2(exponent).unsqueeze(-1)).flatten(-2)[..., :n]
    scale = (exponent + 127).to(torch.uint8).unflatten(-1, (-1, 2))
    return (to_fp4(scaled) if fp4 else to_fp8(scaled)), scale


def low_words(scale: torch.Tensor) -> torch.Tensor:
    """Factors in fp32 of int64 [...] that carry them in their low halves."""
    words = (scale & 0xFFFFFFFF).numpy().astype("uint32").view("float32")
    return torch.from_numpy(words)


def mx_scales(scale: torch.Tensor, n: int) -> torch.Tensor:
    """Factors [..., n] of MX scale bytes [..., ceil(n / 64), 2]."""
    wide = scale.contiguous().view(E8M0).float().flatten(-2)
    return wide.repeat_interleave(MX_GROUP, -1)[..., :n]
