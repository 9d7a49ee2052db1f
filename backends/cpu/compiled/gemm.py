"""Products of few rows with weights as they are stored, compiled: a weight is read once."""

from __future__ import annotations

import math

import torch

from v4_ascend.backends.cpu.compiled.library import (
    IS_WIDE,
    MISSING,
    Function,
    is_bf16,
    pointer,
)
from v4_ascend.ops import fp4_gemm, fp8_gemm, grouped_gemm, heads_gemm, linear
from v4_ascend.ops.formats import E8M0, is_mx

_plain = Function("gemv_plain", "ppppiiiiiii")
_fp8 = Function("gemv_fp8", "ppppppiiiiiiiiii")
_fp4 = Function("gemv_fp4", "ppppppiiiiii")
BLOCK, MX_GROUP = 128, 32
# Rows of an expert from which on torch's products are faster: where vectors are wide it has
# instructions for bf16 too, and a quantised weight it must widen as a whole first.
FEW_ROWS = {torch.float32: 64 if IS_WIDE else 8, torch.bfloat16: 4 if IS_WIDE else 64}
QUANTISED_ROWS = math.inf if IS_WIDE else 256


def _few(n_rows: int, most: float) -> str | None:
    if MISSING is not None:
        return MISSING
    return f"{n_rows} rows: torch multiplies more than {most} faster" if n_rows > most else None


def _product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    sizes: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply by [n_experts, n, k] of a quantised format."""
    n_experts, n, _ = weight.shape
    n_rows, k = x.shape
    out = torch.empty(n_rows, n, dtype=dtype)
    given = [t.contiguous() for t in (x, x_scale, weight, weight_scale, sizes)]
    arrays = (*map(pointer, (*given, out)), n_rows, n_experts, n, k, k // x_scale.shape[1])
    if weight.dtype == torch.int8:
        _fp4(*arrays, is_bf16(out))
        return out
    rows, group = (1, MX_GROUP) if is_mx(weight, weight_scale) else (BLOCK, BLOCK)
    is_fp32 = weight_scale.dtype != E8M0
    _fp8(*arrays, rows, group, weight_scale.shape[1], is_fp32, is_bf16(out))
    return out


def _why_not_quantised(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if b_scale.dtype not in (E8M0, torch.float32):
        return f"scales are {b_scale.dtype}"
    if out_dtype not in FEW_ROWS:
        return f"results are {out_dtype}"
    return _few(len(a), QUANTISED_ROWS)


@fp8_gemm.kernel("cpu", provider="c++", why_not=_why_not_quantised)
def fp8_gemm_compiled(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Read a byte for each weight."""
    sizes = torch.tensor([len(a)])
    return _product(a, a_scale, b.unsqueeze(0), b_scale.unsqueeze(0), sizes, out_dtype)


@fp4_gemm.kernel("cpu", provider="c++", why_not=_why_not_quantised)
def fp4_gemm_compiled(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Read half a byte for each weight."""
    sizes = torch.tensor([len(a)])
    return _product(a, a_scale, b.unsqueeze(0), b_scale.unsqueeze(0), sizes, out_dtype)


def _why_not_grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if weight_scale is not None and weight_scale.dtype not in (E8M0, torch.float32):
        return f"scales are {weight_scale.dtype}"
    plain = [out_dtype] if weight_scale is not None else [out_dtype, x.dtype, weight.dtype]
    if not FEW_ROWS.keys() >= set(plain):
        return f"{plain}, not all fp32 or bf16"
    each = QUANTISED_ROWS if weight_scale is not None else FEW_ROWS[weight.dtype]
    return _few(len(x), each * len(weight))


@grouped_gemm.kernel("cpu", provider="c++", why_not=_why_not_grouped)
def grouped_gemm_compiled(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Read the weight of each expert that has rows once for at most 64 of them."""
    if x_scale is not None and weight_scale is not None:
        return _product(x, x_scale, weight, weight_scale, group_sizes, out_dtype)
    return plain_product(x, weight, group_sizes, out_dtype)


def plain_product(
    x: torch.Tensor, weight: torch.Tensor, sizes: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply rows grouped by the matrix [n_matrices, n, k] they are for, with sums in fp32."""
    n_matrices, n, k = weight.shape
    out = torch.empty(len(x), n, dtype=dtype)
    x, weight, sizes = x.contiguous(), weight.contiguous(), sizes.contiguous()
    arrays = map(pointer, (x, weight, sizes, out))
    types = map(is_bf16, (x, weight, out))
    _plain(*arrays, len(x), n_matrices, n, k, *types)
    return out


def few_plain(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why these rows [n_rows, ...] are not for `plain_product`, or None."""
    if MISSING is None and (x.dtype != weight.dtype or x.dtype not in FEW_ROWS):
        return f"x is {x.dtype}, the weight {weight.dtype}"
    return _few(len(x), FEW_ROWS.get(x.dtype, 0))


@linear.kernel("cpu", provider="c++", why_not=few_plain)
def linear_compiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Read each weight once for all rows."""
    return plain_product(x, weight.unsqueeze(0), torch.tensor([len(x)]), x.dtype)


@heads_gemm.kernel("cpu", provider="c++", why_not=few_plain)
def heads_gemm_compiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Take each group's rows as an expert's."""
    n_tokens, n_groups, k = x.shape
    rows = x.transpose(0, 1).reshape(-1, k)
    out = plain_product(rows, weight, torch.full((n_groups,), n_tokens), x.dtype)
    return out.view(n_groups, n_tokens, weight.shape[1]).transpose(0, 1)
