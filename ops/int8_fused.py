"""What A2 and A3 compute around an INT8 product in the same call: one rounding, to INT8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from v4_ascend.ops import formats
from v4_ascend.ops.gemm import BF16, FP32
from v4_ascend.ops.int8 import grouped_inputs, grouped_int8_gemm
from v4_ascend.ops.op import OF_DIM, ROUNDED, Case, Tolerance, op
from v4_ascend.ops.rms_norm import rms_norm
from v4_ascend.ops.swiglu import swiglu

# Where an fp32 sum in another order is near a tie, the integer is its neighbour.
INT8_ROWS = {torch.int8: Tolerance(rtol=0.0, atol=1.0, diff=1e-6), FP32: ROUNDED[FP32]}


def is_let_go(weight: torch.Tensor) -> bool:
    """Whether a weight has a shape alone: a backend keeps its values in a layout of its own."""
    return weight.untyped_storage().nbytes() < weight.nbytes


def _experts_inputs(g: torch.Generator, **shape: Any) -> dict[str, Any]:
    inputs = grouped_inputs(g, **shape, dtype=FP32)
    del inputs["out_dtype"]
    # Products far beyond the limit, as many as below it.
    return inputs | {"weight_scale": inputs["weight_scale"] * 8, "limit": 10.0}


def _experts_cases() -> Iterator[Case]:
    shapes = {
        "empty": ((0, 0), 256, 128),
        "one": ((0, 1, 0), 256, 128),
        "odd": ((3, 0, 5, 1), 204, 256),
        "many": ((40, 3, 0), 208, 256),
        "flash": ((3, 2), 4096, 4096),  # few: a case's weights are made in fp32
        "pro": ((5,), 6144, 7168),
    }
    for bits in (8, 4):
        for name, (sizes, n, k) in shapes.items():
            make = partial(_experts_inputs, sizes=sizes, n=n, k=k, bits=bits)
            yield Case(f"int{bits}-{name}", make, models=(name,) if n >= 4096 else ())


@op(cases=_experts_cases, tolerance=INT8_ROWS)
def grouped_int8_gemm_swiglu(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run rows through their experts' gate and up projection: `swiglu` of it, by token in int8.

    The product and the activation are fp32, rounded once. A routing weight, which is positive,
    multiplies a row's scale afterwards: the integers are the same.

    Shapes:
        x             [n_rows, k]  int8
        x_scale       [n_rows]  fp32
        weight        as `grouped_int8_gemm`, n = 2 * inter_dim: gate first, then up
        weight_scale  [n_experts, n]  fp32
        group_sizes   [n_experts]  int64, rows of each expert; they sum to n_rows
        return        values [n_rows, inter_dim] int8, scales [n_rows] fp32

    Raises:
        ValueError: the weight was let go, as another layout of it serves a backend's kernels.

    Source: vllm-ascend csrc/gmm/grouped_matmul_swiglu_quant; ops-transformer
    gmm/grouped_matmul_swiglu_quant_v2.
    """
    if is_let_go(weight):
        raise ValueError("the weight was let go: its values are in the layout of a kernel alone")
    product = grouped_int8_gemm.reference(x, x_scale, weight, weight_scale, group_sizes, FP32)
    return formats.quantize_int8(swiglu.reference(product, limit, None))


def _norm_inputs(g: torch.Generator, n_tokens: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    octave = torch.randint(-6, 6, (n_tokens, 1), generator=g).float()
    x = torch.randn(n_tokens, dim, generator=g) * torch.exp2(octave)
    # A checkpoint's norms are bf16, and are widened when they are read.
    weight = torch.randn(dim, generator=g).to(dtype).float()
    return {"x": x.to(dtype), "weight": weight, "eps": 1e-6}


def _norm_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for n_tokens, dim in ((0, 64), (1, 64), (3, 513), (33, 1536), *((128, d) for d in OF_DIM)):
            name = f"{str(dtype).removeprefix('torch.')}-{n_tokens}x{dim}"
            make = partial(_norm_inputs, n_tokens=n_tokens, dim=dim, dtype=dtype)
            yield Case(name, make, models=OF_DIM.get(dim, ()))


@op(cases=_norm_cases, tolerance=INT8_ROWS)
def rms_norm_int8(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `rms_norm` by token to int8, for INT8 products alone: fp32 is rounded once.

    Shapes:
        x       [n_tokens, dim]  bf16 or fp32
        weight  [dim]  fp32
        return  values [n_tokens, dim] int8, scales [n_tokens] fp32

    Source: vllm-ascend csrc, rms_norm_dynamic_quant.
    """
    return formats.quantize_int8(rms_norm.reference(x.float(), weight, eps))
