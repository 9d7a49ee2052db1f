"""RMSNorm, and the unweighted norm of each query head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from v4_ascend.ops.op import FLASH, OF_DIM, PRO, ROUNDED, Case, Tolerance, op

BF16, FP32 = torch.bfloat16, torch.float32


def _rms_inputs(g: torch.Generator, n_tokens: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(n_tokens, dim, generator=g).to(dtype),
        "weight": torch.randn(dim, generator=g),
        "eps": 1e-6,
    }


def _rms_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for n_tokens, dim in ((0, 64), (1, 64), (3, 513), *((128, d) for d in OF_DIM)):
            name = f"{str(dtype).removeprefix('torch.')}-{n_tokens}x{dim}"
            make = partial(_rms_inputs, n_tokens=n_tokens, dim=dim, dtype=dtype)
            yield Case(name, make, models=OF_DIM.get(dim, ()))


@op(cases=_rms_cases, tolerance=ROUNDED)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row of `x` to unit root mean square, then by `weight`.

    Everything in fp32, one cast at the end.

    Shapes:
        x       [..., dim]  bf16 or fp32
        weight  [dim]       fp32
        return  [..., dim]  dtype of x

    Source: DeepSeek-V4 inference/model.py, RMSNorm.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def _head_inputs(
    g: torch.Generator, n_tokens: int, n_heads: int, head_dim: int, dtype: torch.dtype
) -> dict[str, Any]:
    return {"q": torch.randn(n_tokens, n_heads, head_dim, generator=g).to(dtype), "eps": 1e-6}


def _head_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for n_tokens, n_heads, head_dim in (
            (0, 2, 64),
            (1, 1, 8),
            (3, 5, 66),
            (17, 64, 512),
            (17, 128, 512),
        ):
            name = f"{str(dtype).removeprefix('torch.')}-{n_tokens}x{n_heads}x{head_dim}"
            make = partial(
                _head_inputs, n_tokens=n_tokens, n_heads=n_heads, head_dim=head_dim, dtype=dtype
            )
            yield Case(name, make, models={64: FLASH, 128: PRO}.get(n_heads, ()))


@op(
    cases=_head_cases,
    # bf16: a kernel may keep fp32 inside, the reference rounds after each of four steps.
    tolerance={**ROUNDED, BF16: Tolerance(rtol=2**-5, atol=1e-3, diff=1e-4)},
)
def head_rms_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each query head to unit root mean square; there is no learned weight.

    Every step is rounded to the dtype of `q`, as the published code does.

    Shapes:
        q       [n_tokens, n_heads, head_dim]  bf16 or fp32
        return  the same

    Source: DeepSeek-V4 inference/model.py, Attention.
    """
    return q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)
