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


def _round_trip_inputs(
    g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, more: dict[str, Any]
) -> dict[str, Any]:
    return _inputs(g, shape, 1, dtype) | more


def _round_trip_cases(
    shapes: tuple[tuple[int, ...], ...], named: dict[str, dict[str, Any]]
) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in shapes:
            for name, more in named.items():
                make = partial(_round_trip_inputs, shape=shape, dtype=dtype, more=more)
                yield Case(
                    f"{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}-{name}",
                    make,
                    models=BOTH if shape[0] == 64 else (),
                )


@op(
    cases=partial(
        _round_trip_cases,
        ((0, 128), (1, 192), (3, 2, 128), (64, 512)),
        {"g64": {"group_size": 64, "n_kept": 0}, "g64-keeps64": {"group_size": 64, "n_kept": 64}},
    ),
    tolerance={},
)
def fp8_round_trip(x: torch.Tensor, group_size: int, n_kept: int) -> torch.Tensor:
    """Return what an FP8 cache would give back: quantised and dequantised, dtype of `x`.

    The last `n_kept` channels of a row stay as they are: those that are rotated.

    Shapes:
        x       [..., n]  bf16 or fp32, n - n_kept a multiple of group_size
        return  the same

    Raises:
        ValueError: group_size does not divide n - n_kept.

    Source: DeepSeek-V4 inference/model.py, act_quant of kv in place.
    """
    rounded, kept = x.split((x.shape[-1] - n_kept, n_kept), -1)
    back = formats.dequantize_groups(*act_quant.reference(rounded, group_size)).to(x.dtype)
    return torch.cat((back, kept), dim=-1) if n_kept else back


@op(
    cases=partial(
        _round_trip_cases, ((0, 64), (1, 32), (3, 2, 64), (64, 128)), {"g32": {"group_size": 32}}
    ),
    tolerance={},
)
def fp4_round_trip(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return what an FP4 cache would give back: quantised and dequantised, dtype of `x`.

    Shapes:
        x       [..., n]  bf16 or fp32, n a multiple of group_size (32)
        return  the same

    Raises:
        ValueError: group_size does not divide n.

    Source: DeepSeek-V4 inference/model.py, fp4_act_quant of the indexer in place.
    """
    back = formats.dequantize_fp4(*fp4_act_quant.reference(x, group_size), group=group_size)
    return back.to(x.dtype)
