"""The experts' clamped activation, as it is and quantised for their last product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.ops.act_quant import act_quant
from v4_ascend.ops.formats import FP8
from v4_ascend.ops.gemm import ACT_GROUP
from v4_ascend.ops.op import FLASH, PRO, ROUNDED, Case, Tolerance, op


def _inputs(
    g: torch.Generator, n_rows: int, inter_dim: int, weighted: bool, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "x": (torch.randn(n_rows, 2 * inter_dim, generator=g) * 8).to(dtype),
        "limit": 10.0,
        "weight": torch.rand(n_rows, generator=g) if weighted else None,
    }


def _spread_inputs(g: torch.Generator, **shape: Any) -> dict[str, Any]:
    """Groups of channels of many magnitudes, so that their scales differ."""
    inputs = _inputs(g, **shape)
    octave = torch.randint(-6, 1, (shape["inter_dim"] // ACT_GROUP,), generator=g)
    factor = torch.exp2(octave.float()).repeat_interleave(ACT_GROUP).repeat(2)
    return inputs | {"x": inputs["x"] * factor.to(inputs["x"].dtype)}


def _cases(
    inputs: Callable[..., dict[str, Any]], small: tuple[tuple[int, int, bool], ...]
) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for n_rows, inter_dim, weighted in (*small, (64, 2048, True), (64, 3072, False)):
            name = f"{str(dtype).removeprefix('torch.')}-{n_rows}x{inter_dim}"
            make = partial(
                inputs, n_rows=n_rows, inter_dim=inter_dim, weighted=weighted, dtype=dtype
            )
            yield Case(name, make, models={2048: FLASH, 3072: PRO}.get(inter_dim, ()))


@op(
    cases=partial(_cases, _inputs, ((0, 8, True), (1, 8, False), (3, 33, True))),
    tolerance=ROUNDED,
)
def swiglu(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> torch.Tensor:
    """Compute ``weight * silu(min(gate, limit)) * clamp(up, -limit, limit)`` in fp32.

    The clamp is asymmetric: the gate has only an upper bound. The routing weight comes
    here, before the down projection and its quantisation.

    Shapes:
        x       [n_rows, 2 * inter_dim]  bf16 or fp32, gate first, then up
        weight  [n_rows]  fp32; None for the shared expert
        return  [n_rows, inter_dim]  dtype of x

    Source: DeepSeek-V4 inference/model.py, Expert (Pro copy: the shared expert clamps too).
    """
    gate, up = x.float().chunk(2, dim=-1)
    y = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    if weight is not None:
        y = y * weight.unsqueeze(-1)
    return y.to(x.dtype)


@op(
    cases=partial(_cases, _spread_inputs, ((0, 128, True), (1, 128, False), (3, 384, True))),
    # Of bytes: where the activation rounds to its neighbour, a value may do so too.
    tolerance={FP8: Tolerance(rtol=0.0, atol=1.0, diff=1e-6)},
)
def swiglu_act_quant(
    x: torch.Tensor, limit: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `swiglu` for a product: ``act_quant(swiglu(x, limit, weight), 128)``.

    Shapes:
        x       [n_rows, 2 * inter_dim]  bf16 or fp32, inter_dim a multiple of 128
        weight  [n_rows]  fp32; None for the shared expert
        return  values [n_rows, inter_dim] e4m3, scales [n_rows, inter_dim / 128] e8m0

    Raises:
        ValueError: 128 does not divide inter_dim.

    Source: DeepSeek-V4 inference/model.py, Expert; inference/kernel.py, act_quant.
    """
    return act_quant.reference(swiglu.reference(x, limit, weight), ACT_GROUP)
