"""The experts' clamped activation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.ops.op import FLASH, PRO, ROUNDED, Case, op


def _inputs(
    g: torch.Generator, n_rows: int, inter_dim: int, weighted: bool, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "x": (torch.randn(n_rows, 2 * inter_dim, generator=g) * 8).to(dtype),
        "limit": 10.0,
        "weight": torch.rand(n_rows, generator=g) if weighted else None,
    }


def _cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for n_rows, inter_dim, weighted in (
            (0, 8, True),
            (1, 8, False),
            (3, 33, True),
            (64, 2048, True),
            (64, 3072, False),
        ):
            name = f"{str(dtype).removeprefix('torch.')}-{n_rows}x{inter_dim}"
            make = partial(
                _inputs, n_rows=n_rows, inter_dim=inter_dim, weighted=weighted, dtype=dtype
            )
            yield Case(name, make, models={2048: FLASH, 3072: PRO}.get(inter_dim, ()))


@op(cases=_cases, tolerance=ROUNDED)
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
