"""INT8 matrix products: activations by token, INT8 or INT4 weights by output channel.

What A2 and A3 compute in; `v4-ascend convert --to w8a8` and ``w4a8`` make such weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from v4_ascend.ops import formats
from v4_ascend.ops.gemm import BF16, FLASH_PRO, FP32, SMALL
from v4_ascend.ops.op import OF_DIM, ROUNDED, Case, op


def _quant_inputs(g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    octave = torch.randint(-12, 8, (*shape[:-1], 1), generator=g).float()
    return {"x": (torch.randn(shape, generator=g) * torch.exp2(octave)).to(dtype)}


def _quant_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for shape in ((0, 128), (1, 128), (3, 200), (33, 4096), (33, 7168)):
            name = f"{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}"
            models = OF_DIM.get(shape[-1], ())
            yield Case(name, partial(_quant_inputs, shape=shape, dtype=dtype), models=models)


@op(cases=_quant_cases, tolerance={})
def int8_act_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each token to int8: the largest magnitude is 127 steps, ties go to even.

    Shapes:
        x       [n_tokens, n]  bf16 or fp32
        return  values [n_tokens, n] int8, scales [n_tokens] fp32; a token of zeros has scale 0

    Source: op-plugin npu_dynamic_quant.md.
    """
    return formats.quantize_int8(x)


def grouped_weight(
    g: torch.Generator, shape: tuple[int, ...], bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a case's weight and its scales, INT8 or packed INT4."""
    plain = torch.randn(shape, generator=g) * shape[-1] ** -0.5
    if bits == 8:
        return formats.quantize_int8(plain)
    scale = plain.abs().amax(-1) / 7
    return formats.pack_int4_rows((plain / scale.unsqueeze(-1)).round().to(torch.int8)), scale


def _gemm_inputs(
    g: torch.Generator, m: int, n: int, k: int, out_dtype: torch.dtype
) -> dict[str, Any]:
    a, a_scale = int8_act_quant.reference(torch.randn(m, k, generator=g))
    b, b_scale = grouped_weight(g, (n, k), 8)
    return {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "out_dtype": out_dtype}


def _gemm_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for m, n, k in (*SMALL, *FLASH_PRO):
            name = f"{str(dtype).removeprefix('torch.')}-{m}x{n}x{k}"
            make = partial(_gemm_inputs, m=m, n=n, k=k, out_dtype=dtype)
            yield Case(name, make, models=OF_DIM[k] if m == 33 else ())


@op(cases=_gemm_cases, tolerance=ROUNDED)
def int8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply int8 activations with int8 weights: ``(a @ b.T) * a_scale * b_scale``.

    Sums are whole numbers, scaled in fp32 and rounded once.

    Shapes:
        a        [m, k]  int8
        a_scale  [m]  fp32
        b        [n, k]  int8
        b_scale  [n]  fp32
        return   [m, n]  out_dtype

    Source: op-plugin npu_quant_matmul.md.
    """
    # fp64 holds every such sum: 2^14 products of 2^14.
    sums = a.double() @ b.double().T
    return (sums.float() * b_scale * a_scale.unsqueeze(-1)).to(out_dtype)


def grouped_inputs(
    g: torch.Generator, sizes: tuple[int, ...], n: int, k: int, bits: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Make a case's arguments: `bits` of the weights, 8 or 4."""
    x, x_scale = int8_act_quant.reference(torch.randn(sum(sizes), k, generator=g))
    weight, weight_scale = grouped_weight(g, (len(sizes), n, k), bits)
    return {
        "x": x,
        "x_scale": x_scale,
        "weight": weight,
        "weight_scale": weight_scale,
        "group_sizes": torch.tensor(sizes),
        "out_dtype": dtype,
    }


def _grouped_cases() -> Iterator[Case]:
    shapes = {
        "empty": ((0, 0), 128, 128),
        "one": ((0, 1, 0), 128, 128),
        "odd": ((3, 0, 5, 1), 200, 256),
        "flash-w1": ((7, 0, 1, 9), 2048, 4096),
        "pro-w2": ((2, 5), 7168, 3072),
    }
    for bits in (8, 4):
        for dtype in (BF16, FP32):
            for name, (sizes, n, k) in shapes.items():
                make = partial(grouped_inputs, sizes=sizes, n=n, k=k, bits=bits, dtype=dtype)
                case = f"int{bits}-{str(dtype).removeprefix('torch.')}-{name}"
                yield Case(case, make, models=(name.split("-")[0],) if n >= 2048 else ())


@op(cases=_grouped_cases, tolerance=ROUNDED)
def grouped_int8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply consecutive groups of int8 rows, each with its own expert's weight.

    A weight with half as many rows as scales is INT4, two output channels a byte.

    Shapes:
        x             [n_rows, k]  int8
        x_scale       [n_rows]  fp32
        weight        [n_experts, n, k] int8; [n_experts, n / 2, k] int8, the even row low
        weight_scale  [n_experts, n]  fp32
        group_sizes   [n_experts]  int64, rows of each expert; they sum to n_rows
        return        [n_rows, n]  out_dtype

    Source: op-plugin npu_grouped_matmul.md; vllm-ascend quantization/methods/w4a8.py.
    """
    out = torch.empty(x.shape[0], weight_scale.shape[1], dtype=out_dtype, device=x.device)
    start = 0
    for expert, size in enumerate(group_sizes.tolist()):
        if not size:
            continue
        rows = slice(start, start + size)
        start += size
        b = weight[expert]
        if is_int4(weight, weight_scale):
            b = formats.unpack_int4_rows(b)
        out[rows] = int8_gemm.reference(x[rows], x_scale[rows], b, weight_scale[expert], out_dtype)
    return out


def is_int4(weight: torch.Tensor, weight_scale: torch.Tensor) -> bool:
    """Whether the bytes of experts hold two output channels each."""
    return weight.shape[1] * 2 == weight_scale.shape[1]
