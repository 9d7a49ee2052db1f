"""Matrix products: FP8 x FP8, FP8 x FP4, the experts', plain ones, and one per group of heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.ops import formats
from v4_ascend.ops.act_quant import act_quant
from v4_ascend.ops.op import FLASH, OF_DIM, PRO, ROUNDED, Case, op

BF16, FP32 = torch.bfloat16, torch.float32
ACT_GROUP = 128  # channels per activation scale of a GEMM input
SMALL = ((0, 128, 128), (1, 128, 256), (3, 200, 384))
FLASH_PRO = ((33, 1024, 4096), (33, 1536, 7168))  # wq_a


def _quantize_mxfp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return act_quant.reference(weight, formats.MX_GROUP)


QUANTIZE = {
    "fp8": formats.quantize_fp8_block,
    "fp4": formats.quantize_fp4,
    "mxfp8": _quantize_mxfp8,
}


def _activation(g: torch.Generator, n_tokens: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return act_quant.reference(torch.randn(n_tokens, k, generator=g), ACT_GROUP)


def _gemm_inputs(
    g: torch.Generator, m: int, n: int, k: int, weight: str, out_dtype: torch.dtype
) -> dict[str, Any]:
    a, a_scale = _activation(g, m, k)
    b, b_scale = QUANTIZE[weight](torch.randn(n, k, generator=g) * k**-0.5)
    return {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "out_dtype": out_dtype}


def _gemm_cases(weight: str) -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for m, n, k in (*SMALL, *FLASH_PRO):
            name = f"{str(dtype).removeprefix('torch.')}-{m}x{n}x{k}"
            make = partial(_gemm_inputs, m=m, n=n, k=k, weight=weight, out_dtype=dtype)
            yield Case(name, make, models=OF_DIM[k] if m == 33 else ())
    if weight == "fp8":
        make = partial(_gemm_inputs, m=3, n=200, k=384, weight="mxfp8", out_dtype=BF16)
        yield Case("mx-bfloat16-3x200x384", make)


@op(cases=partial(_gemm_cases, "fp8"), tolerance=ROUNDED)
def fp8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply FP8 activations with FP8 weights, in 128 x 128 blocks or MXFP8: ``a @ b.T``.

    Sums are fp32 and rounded once. Scales are powers of two, so scaling the operands is
    exact and only the order of the sums is left to a kernel.

    Shapes:
        a        [m, k]  e4m3, k a multiple of 128
        a_scale  [m, k / 128]  e8m0
        b        [n, k]  e4m3
        b_scale  [ceil(n / 128), k / 128]  e8m0 or fp32; [n, k / 32] e8m0 is MXFP8
        return   [m, n]  out_dtype

    Source: DeepSeek-V4 inference/kernel.py, fp8_gemm.
    """
    product = formats.dequantize_groups(a, a_scale) @ formats.dequantize_fp8(b, b_scale).T
    return product.to(out_dtype)


@op(cases=partial(_gemm_cases, "fp4"), tolerance=ROUNDED)
def fp4_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply FP8 activations with FP4 weights: ``a @ b.T``.

    Shapes:
        a        [m, k]  e4m3, k a multiple of 128
        a_scale  [m, k / 128]  e8m0
        b        [n, k / 2]  int8, two e2m1 a byte, low nibble first
        b_scale  [n, k / 32]  e8m0
        return   [m, n]  out_dtype

    Source: DeepSeek-V4 inference/kernel.py, fp4_gemm.
    """
    product = formats.dequantize_groups(a, a_scale) @ formats.dequantize_fp4(b, b_scale).T
    return product.to(out_dtype)


def _grouped_inputs(
    g: torch.Generator, sizes: tuple[int, ...], n: int, k: int, weight: str, dtype: torch.dtype
) -> dict[str, Any]:
    n_rows, n_experts = sum(sizes), len(sizes)
    plain = torch.randn(n_experts, n, k, generator=g) * k**-0.5
    inputs: dict[str, Any] = {"group_sizes": torch.tensor(sizes), "out_dtype": dtype}
    if weight == "plain":
        x = torch.randn(n_rows, k, generator=g).to(dtype)
        return inputs | {"x": x, "x_scale": None, "weight": plain.to(dtype), "weight_scale": None}
    quantized = [QUANTIZE[weight](w) for w in plain]
    x, x_scale = _activation(g, n_rows, k)
    return inputs | {
        "x": x,
        "x_scale": x_scale,
        "weight": torch.stack([w for w, _ in quantized]),
        "weight_scale": torch.stack([s.view(torch.uint8) for _, s in quantized]).view(formats.E8M0),
    }


def _grouped_cases() -> Iterator[Case]:
    shapes = {
        "empty": ((0, 0), 128, 128),
        "one": ((0, 1, 0), 128, 128),
        "alone": ((5,), 200, 256),
        "odd": ((3, 0, 5, 1), 200, 256),
        "some": ((14, 11), 128, 128),  # of so many rows an expert kernels take other tiles
        "many": ((70, 3), 200, 256),
        "flash-w1": ((7, 0, 1, 9), 2048, 4096),
        "flash-many": ((90, 3), 2048, 4096),
        "pro-w2": ((2, 5), 7168, 3072),
    }
    for weight in ("plain", "fp8", "fp4"):
        for dtype in (BF16, FP32):
            for name, (sizes, n, k) in shapes.items():
                make = partial(_grouped_inputs, sizes=sizes, n=n, k=k, weight=weight, dtype=dtype)
                case = f"{weight}-{str(dtype).removeprefix('torch.')}-{name}"
                yield Case(case, make, models=(name.split("-")[0],) if n >= 2048 else ())
    sizes, n, k = shapes["odd"]
    make = partial(_grouped_inputs, sizes=sizes, n=n, k=k, weight="mxfp8", dtype=BF16)
    yield Case("mxfp8-bfloat16-odd", make)


@op(cases=_grouped_cases, tolerance=ROUNDED)
def grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply consecutive groups of rows, each with its own expert's weight.

    The weight's dtype is the format: bf16 or fp32 without scales, e4m3 in 128 x 128 blocks,
    int8 for two packed e2m1. Quantised weights take activations from `act_quant`.

    Shapes:
        x             [n_rows, k]  bf16, fp32 or e4m3
        x_scale       [n_rows, k / 128]  e8m0, None for a plain weight
        weight        [n_experts, n, k] bf16, fp32 or e4m3; [n_experts, n, k / 2] int8
        weight_scale  [n_experts, ceil(n / 128), k / 128] for e4m3, [n_experts, n, k / 32] for
                      int8 and for MXFP8
        group_sizes   [n_experts]  int64, rows of each expert; they sum to n_rows
        return        [n_rows, n]  out_dtype

    Source: DeepSeek-V4 inference/model.py, MoE and Expert.
    """
    out = torch.empty(x.shape[0], weight.shape[1], dtype=out_dtype, device=x.device)
    start = 0
    for expert, size in enumerate(group_sizes.tolist()):
        if not size:
            continue
        rows = slice(start, start + size)
        start += size
        if x_scale is None or weight_scale is None:
            out[rows] = F.linear(x[rows], weight[expert]).to(out_dtype)
        else:
            gemm = fp4_gemm if weight.dtype == torch.int8 else fp8_gemm
            args = (x[rows], x_scale[rows], weight[expert], weight_scale[expert], out_dtype)
            out[rows] = gemm.reference(*args)
    return out


def _linear_inputs(
    g: torch.Generator, n_tokens: int, n: int, k: int, dtype: torch.dtype
) -> dict[str, Any]:
    weight = torch.randn(n, k, generator=g) * k**-0.5
    return {"x": torch.randn(n_tokens, k, generator=g).to(dtype), "weight": weight.to(dtype)}


def _linear_cases() -> Iterator[Case]:
    shapes = {
        "empty": (0, 16, 32, ()),
        "one": (1, 16, 64, ()),
        "few": (7, 32, 64, ()),
        "odd": (9, 19, 45, ()),
        "many": (70, 48, 64, ()),
        "flash-gate": (9, 256, 4096, FLASH),
        "pro-gate": (9, 384, 7168, PRO),
    }
    for dtype in (BF16, FP32):
        for name, (n_tokens, n, k, models) in shapes.items():
            make = partial(_linear_inputs, n_tokens=n_tokens, n=n, k=k, dtype=dtype)
            yield Case(f"{str(dtype).removeprefix('torch.')}-{name}", make, models)


@op(cases=_linear_cases, tolerance=ROUNDED)
def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply by a weight that is not quantised: ``x @ weight.T``.

    Sums are fp32 and rounded once.

    Shapes:
        x       [n_tokens, k]  bf16 or fp32
        weight  [n, k]  dtype of x
        return  [n_tokens, n]  dtype of x

    Source: DeepSeek-V4 inference/model.py, linear.
    """
    return F.linear(x, weight)


def _heads_inputs(
    g: torch.Generator, n_tokens: int, groups: int, out: int, k: int, dtype: torch.dtype
) -> dict[str, Any]:
    weight = torch.randn(groups, out, k, generator=g) * k**-0.5
    return {
        "x": torch.randn(n_tokens, groups, k, generator=g).to(dtype),
        "weight": weight.to(dtype),
    }


def _heads_cases() -> Iterator[Case]:
    shapes = {
        "empty": (0, 2, 16, 32, ()),
        "one": (1, 2, 16, 32, ()),
        "alone": (5, 1, 32, 16, ()),
        "odd": (5, 3, 20, 24, ()),
        "flash": (9, 8, 1024, 4096, FLASH),
        "pro": (9, 16, 1024, 4096, PRO),
    }
    for dtype in (BF16, FP32):
        for name, (n_tokens, groups, out, k, models) in shapes.items():
            make = partial(_heads_inputs, n_tokens=n_tokens, groups=groups, out=out, k=k)
            kind = str(dtype).removeprefix("torch.")
            yield Case(f"{kind}-{name}", partial(make, dtype=dtype), models)


@op(cases=_heads_cases, tolerance=ROUNDED)
def heads_gemm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply what each group of heads gives by the group's own matrix, in one format.

    Sums are fp32 and rounded once; nothing is quantised, as DeepSeek's `wo_a` is not.

    Shapes:
        x       [n_tokens, n_groups, k]  bf16 or fp32
        weight  [n_groups, n, k]  dtype of x
        return  [n_tokens, n_groups, n]  dtype of x

    Source: DeepSeek-V4 inference/model.py, Attention, wo_a.
    """
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
