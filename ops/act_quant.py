"""Quantise activations by groups of channels, as GEMM inputs, caches and the indexer do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from v4_ascend.ops import formats
from v4_ascend.ops.op import BOTH, OF_DIM, Case, op


def _inputs(
    g: torch.Generator, shape: tuple[int, ...], group_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    # Magnitudes over many octaves, so that scales differ and some values underflow.
    octave = torch.randint(-12, 8, shape, generator=g).float()
    x = torch.randn(shape, generator=g) * torch.exp2(octave)
    return {"x": x.to(dtype), "group_size": group_size}


def _cases(groups: tuple[int, ...], widths: tuple[int, ...]) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for group in groups:
            small = ((0, group), (1, group), (3, 5 * group), (3, 2, group))
            for shape in (*small, *((128, w) for w in widths if w % group == 0)):
                name = f"{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}-g{group}"
                make = partial(_inputs, shape=shape, group_size=group, dtype=dtype)
                yield Case(
                    name, make, models=OF_DIM.get(shape[-1], BOTH) if shape[0] == 128 else ()
                )


def _grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    if x.shape[-1] % group_size:
        raise ValueError(f"group_size ({group_size}) must divide the row length ({x.shape[-1]})")
    return x.float().unflatten(-1, (-1, group_size))


@op(cases=partial(_cases, (64, 128), (448, 4096, 7168)), tolerance={})
def act_quant(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to e4m3 with one power-of-two scale per `group_size` channels.

    The scale is the smallest power of two under which the group fits +-448, so nothing
    saturates. Bytes are part of the contract: kernels must return the same ones.

    Shapes:
        x       [..., n]  bf16 or fp32, n a multiple of group_size (128 for GEMM inputs, 64 for kv)
        return  values [..., n] e4m3, scales [..., n / group_size] e8m0

    Raises:
        ValueError: group_size does not divide n.

    Source: DeepSeek-V4 inference/kernel.py, act_quant (scale_fmt ue8m0).
    """
    grouped = _grouped(x, group_size)
    scale = formats.fp8_scale(grouped.abs().amax(-1))
    scaled = grouped / formats.scale_to_float(scale).unsqueeze(-1)
    return formats.round_to_fp8(scaled).flatten(-2), scale


@op(cases=partial(_cases, (32,), (128, 4096)), tolerance={})
def fp4_act_quant(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to packed e2m1 with one power-of-two scale per `group_size` channels.

    Shapes:
        x       [..., n]  bf16 or fp32, n a multiple of group_size (32)
        return  packed [..., n / 2] int8 (low nibble first), scales [..., n / group_size] e8m0

    Raises:
        ValueError: group_size does not divide n.

    Source: DeepSeek-V4 inference/kernel.py, fp4_act_quant.
    """
    grouped = _grouped(x, group_size)
    scale = formats.fp4_scale(grouped.abs().amax(-1))
    scaled = grouped / formats.scale_to_float(scale).unsqueeze(-1)
    codes = formats.round_to_fp4(scaled.clamp(-formats.FP4_MAX, formats.FP4_MAX))
    return formats.pack_fp4(codes.flatten(-2)), scale


def fp8_round_trip(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return what an FP8 cache would give back: quantised and dequantised, dtype of `x`."""
    return formats.dequantize_groups(*act_quant(x, group_size)).to(x.dtype)


def fp4_round_trip(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return what an FP4 cache would give back: quantised and dequantised, dtype of `x`."""
    return formats.dequantize_fp4(*fp4_act_quant(x, group_size), group=group_size).to(x.dtype)
