"""Quantised activations, compiled: each group is read twice, the second time from the cache."""

from __future__ import annotations

import torch

from v4_ascend.backends.cpu.compiled.library import MISSING, Function, is_bf16, pointer, why_not
from v4_ascend.backends.cpu.compiled.rows import swiglu_compiled
from v4_ascend.ops import (
    act_quant,
    fp4_act_quant,
    fp4_round_trip,
    fp8_round_trip,
    hadamard,
    swiglu_act_quant,
)
from v4_ascend.ops.formats import E8M0, FP8
from v4_ascend.ops.gemm import ACT_GROUP

_act_quant = Function("act_quant", "pppiii")
_fp4_act_quant = Function("fp4_act_quant", "pppiii")
_fp8_round_trip = Function("fp8_round_trip", "ppiiiii")
_fp4_round_trip = Function("fp4_round_trip", "ppiii")
_hadamard = Function("hadamard", "ppiii")
LANES = 16  # channels that csrc/quant.cpp takes at once


def _why_not(x: torch.Tensor, group_size: int) -> str | None:
    if group_size % LANES or x.shape[-1] % group_size:
        return f"groups of {group_size} in rows of {x.shape[-1]}"
    return why_not(x)


@act_quant.kernel("cpu", provider="c++", why_not=_why_not)
def act_quant_compiled(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round by bits, as the reference's conversion does."""
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=FP8)
    scale = torch.empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=E8M0)
    arrays = map(pointer, (x, values, scale))
    _act_quant(*arrays, scale.numel(), group_size, is_bf16(x))
    return values, scale


@fp4_act_quant.kernel("cpu", provider="c++", why_not=_why_not)
def fp4_act_quant_compiled(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare with the midpoints between codes."""
    x = x.contiguous()
    packed = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8)
    scale = torch.empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=E8M0)
    arrays = map(pointer, (x, packed, scale))
    _fp4_act_quant(*arrays, scale.numel(), group_size, is_bf16(x))
    return packed, scale


def _why_not_kept(x: torch.Tensor, group_size: int, n_kept: int) -> str | None:
    if group_size % LANES or (x.shape[-1] - n_kept) % group_size:
        return f"groups of {group_size} in {x.shape[-1] - n_kept} channels"
    return why_not(x)


@fp8_round_trip.kernel("cpu", provider="c++", why_not=_why_not_kept)
def fp8_round_trip_compiled(x: torch.Tensor, group_size: int, n_kept: int) -> torch.Tensor:
    """Round and widen a group while it is near."""
    x = x.contiguous()
    out, n = torch.empty_like(x), x.shape[-1]
    if n:
        _fp8_round_trip(pointer(x), pointer(out), x.numel() // n, n, n_kept, group_size, is_bf16(x))
    return out


@fp4_round_trip.kernel("cpu", provider="c++", why_not=_why_not)
def fp4_round_trip_compiled(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Add up the steps between e2m1 values that lie below each channel."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _fp4_round_trip(pointer(x), pointer(out), x.numel() // group_size, group_size, is_bf16(x))
    return out


def _why_not_rotated(x: torch.Tensor) -> str | None:
    n = x.shape[-1]
    if MISSING is None and (n & (n - 1) or n < LANES):
        return f"rows of {n}, not a power of two from {LANES}"
    return why_not(x)


@hadamard.kernel("cpu", provider="c++", why_not=_why_not_rotated)
def hadamard_compiled(x: torch.Tensor) -> torch.Tensor:
    """Add and subtract in log2(n) passes, in place of n sums of n."""
    x = x.contiguous()
    out, n = torch.empty_like(x), x.shape[-1]
    _hadamard(pointer(x), pointer(out), x.numel() // n, n, is_bf16(x))
    return out


def _why_not_swiglu(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> str | None:
    if x.shape[1] % (2 * ACT_GROUP):
        return f"two halves of {x.shape[1] // 2}, must be multiples of {ACT_GROUP}"
    return why_not(x)


@swiglu_act_quant.kernel("cpu", provider="c++", why_not=_why_not_swiglu)
def swiglu_act_quant_compiled(
    x: torch.Tensor, limit: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both kernels, one after the other."""
    return act_quant_compiled(swiglu_compiled(x, limit, weight), ACT_GROUP)
