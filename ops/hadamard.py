"""Walsh-Hadamard rotation of indexer queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from v4_ascend.ops.op import BOTH, ROUNDED, Case, op


@cache
def _sylvester(n: int) -> torch.Tensor:
    """Matrix H[i, j] = (-1)^popcount(i & j)."""
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h


def _inputs(g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(shape, generator=g).to(dtype)}


def _cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((0, 8), (1, 1), (3, 2, 16), (33, 128), (64, 64, 128)):
            name = f"{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}"
            yield Case(
                name,
                partial(_inputs, shape=shape, dtype=dtype),
                models=BOTH if shape[0] == 64 else (),
            )


@op(cases=_cases, tolerance=ROUNDED)
def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rotate each row by the Sylvester-ordered Hadamard matrix times n^-0.5.

    Queries and keys are both rotated, so without quantisation their products do not change.

    Shapes:
        x       [..., n]  bf16 or fp32, n a power of two
        return  the same; fp32 inside

    Raises:
        ValueError: n is not a power of two.

    Source: DeepSeek-V4 inference/model.py, rotate_activation.
    """
    n = x.shape[-1]
    if n & (n - 1) or n == 0:
        raise ValueError(f"hadamard needs a power of two, got rows of {n}")
    return (x.float() @ _sylvester(n).to(x.device) * n**-0.5).to(x.dtype)
