"""Products of few rows with weights as they are stored, compiled: a weight is read once."""

from __future__ import annotations

import math

import torch

from v4_ascend.backends.cpu.compiled.library import (
    IS_WIDE,
    MISSING,
    function,
    is_bf16,
    pointer,
)
from v4_ascend.ops import fp4_gemm, fp8_gemm, grouped_gemm, heads_gemm, linear
from v4_ascend.ops.formats import E8M0, is_mx

_plain = function("gemv_plain", "ppppiiii")
_fp8 = function("gemv_fp8", "pppppiiiiiii")
_fp4 = function("gemv_fp4", "pppppiii")
_widen = function("widen_fp8", "pppiiii")
BLOCK, MX_GROUP = 128, 32
# Rows of an expert from which on torch's products are faster: where vectors are wide it has
# instructions for bf16 too, and a quantised weight it must widen as a whole first.
FEW = {torch.float32: 64 if IS_WIDE else 8, torch.bfloat16: 4 if IS_WIDE else 64}
QUANTISED_ROWS = math.inf if IS_WIDE else 256


def _few(n_rows: int, most: float) -> str | None:
    if MISSING is not None:
        return MISSING
    return f"{n_rows} rows: torch multiplies more than {most} faster" if n_rows > most else None


def _wide(x: torch.Tensor, scale: torch.Tensor, *, is_split: bool) -> torch.Tensor:
    """Widen quantised activations; split, the even channels of a row come before the odd ones."""
    x, scale = x.contiguous(), scale.contiguous()
    n, k = x.shape
    out = torch.empty(n, k)
    group = k // scale.shape[1]
    _widen(pointer(x), pointer(scale), pointer(out), n, k, group, is_split)
    return out


def _product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    sizes: torch.Tensor,
) -> torch.Tensor:
    """Multiply by [n_experts, n, k] of a quantised format."""
    n_experts, n, _ = weight.shape
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    out, k = torch.empty(len(x), n), x.shape[1]
    is_fp4 = weight.dtype == torch.int8
    wide = _wide(x, x_scale, is_split=is_fp4)
    arrays = (*map(pointer, (wide, weight, weight_scale, sizes, out)), n_experts, n, k)
    if is_fp4:
        _fp4(*arrays)
        return out
    rows, group = (1, MX_GROUP) if is_mx(weight, weight_scale) else (BLOCK, BLOCK)
    is_fp32 = weight_scale.dtype != E8M0
    _fp8(*arrays, rows, group, weight_scale.shape[1], is_fp32)
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
    return _product(a, a_scale, b.unsqueeze(0), b_scale.unsqueeze(0), sizes).to(out_dtype)


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
    return _product(a, a_scale, b.unsqueeze(0), b_scale.unsqueeze(0), sizes).to(out_dtype)


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
    if weight_scale is None and weight.dtype not in FEW:
        return f"weights are {weight.dtype}"
    each = QUANTISED_ROWS if weight_scale is not None else FEW[weight.dtype]
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
    sizes = group_sizes.contiguous()
    if x_scale is not None and weight_scale is not None:
        return _product(x, x_scale, weight, weight_scale, sizes).to(out_dtype)
    return plain_product(x, weight, sizes).to(out_dtype)


def plain_product(x: torch.Tensor, weight: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Multiply rows grouped by the matrix [n_matrices, n, k] they are for, in fp32."""
    n_matrices, n, k = weight.shape
    out, wide, weight = torch.empty(len(x), n), x.float().contiguous(), weight.contiguous()
    arrays = map(pointer, (wide, weight, sizes, out))
    _plain(*arrays, n_matrices, n, k, is_bf16(weight))
    return out


def few_plain(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why these rows [n_rows, ...] are not for `plain_product`, or None."""
    if MISSING is None and (x.dtype != weight.dtype or x.dtype not in FEW):
        return f"x is {x.dtype}, the weight {weight.dtype}"
    return _few(len(x), FEW.get(x.dtype, 0))


@linear.kernel("cpu", provider="c++", why_not=few_plain)
def linear_compiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Read each weight once for all rows."""
    return plain_product(x, weight.unsqueeze(0), torch.tensor([len(x)])).to(x.dtype)


@heads_gemm.kernel("cpu", provider="c++", why_not=few_plain)
def heads_gemm_compiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Take each group's rows as an expert's."""
    n_tokens, n_groups, k = x.shape
    rows = x.transpose(0, 1).reshape(-1, k)
    out = plain_product(rows, weight, torch.full((n_groups,), n_tokens))
    return out.to(x.dtype).view(n_groups, n_tokens, weight.shape[1]).transpose(0, 1)
