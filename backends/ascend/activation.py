"""The experts' activation and what quantises it, in one call: FP8 rows on the 950, INT8 elsewhere.

Products to INT8 rows take the weight in the vendor's FRACTAL_NZ on A2 and A3, whatever else it
says of itself. Nobody reads the weight as it was stored, so it is let go.
"""

from __future__ import annotations

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.custom_ops import c_ascend, torch_npu
from v4_ascend.backends.ascend.gemm import BY_ROWS, COUNTS, ONE_OUTPUT
from v4_ascend.backends.ascend.int8 import PACKED, packed_int4
from v4_ascend.backends.ascend.layouts import in_tiles
from v4_ascend.backends.ascend.soc import A5, current_chip
from v4_ascend.ops import grouped_int8_gemm_swiglu, swiglu, swiglu_act_quant
from v4_ascend.ops.formats import E8M0, FP8, ceil_to_e8m0, quantize_int8
from v4_ascend.ops.gemm import ACT_GROUP
from v4_ascend.ops.int8 import is_int4
from v4_ascend.ops.int8_fused import is_let_go

BY_GROUP = 1  # quant_mode: a factor for each 128 channels
MAX_N, MAX_K = 10240, 65536  # of int8 weights: at most, below
FIRST = "first product"  # of experts: matrix [e, k, n]; of INT4 packed, with its scale and bias


def _why_no_fp8_rows(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, must be bf16"
    if x.shape[1] % (2 * ACT_GROUP):
        return f"two halves of {x.shape[1] // 2}, must be multiples of {ACT_GROUP}"
    return None if limit > 0 else f"limit is {limit}, of which the operator makes no limit"


@swiglu_act_quant.kernel("ascend", provider="_C_ascend", why_not=_why_no_fp8_rows)
def swiglu_group_quant(
    x: torch.Tensor, limit: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the activation in fp32; factors are powers of two, given in fp32."""
    n_rows, inter_dim = x.shape[0], x.shape[1] // 2
    if not n_rows:
        values = torch.empty(0, inter_dim, dtype=FP8, device=x.device)
        return values, torch.empty(0, inter_dim // ACT_GROUP, dtype=E8M0, device=x.device)
    values, scales, _ = c_ascend("npu_swiglu_group_quant")(
        x.contiguous(),
        weight,
        None,  # all rows are some expert's
        dst_type=FP8,
        quant_mode=BY_GROUP,
        group_size=ACT_GROUP,
        round_scale=True,
        clamp_value=limit,
    )
    return values, ceil_to_e8m0(scales)


@grouped_int8_gemm_swiglu.preparation("ascend")
def keep_first_product(weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    """Keep the weight as products read it, and let go of the one that was loaded."""
    if is_let_go(weight):
        return  # it was prepared before
    if not is_int4(weight, weight_scale):
        matrix = weight.transpose(1, 2).contiguous()
        made: tuple[torch.Tensor, ...] = (matrix if current_chip() == A5 else in_tiles(matrix),)
    elif weight_scale.shape[1] % PACKED or current_chip() == A5:
        return
    else:
        packed, scale, bias = packed_int4(weight, weight_scale)
        made = in_tiles(packed), scale, bias
    prepared.keep(weight_scale, FIRST, made)
    prepared.let_go(weight)


def _why_no_first(
    weight: torch.Tensor, weight_scale: torch.Tensor, limit: float, *, int4: bool
) -> str | None:
    if is_int4(weight, weight_scale) is not int4:
        return f"the weight is int{8 if int4 else 4}"
    if not prepared.has(weight_scale, FIRST):
        n = weight_scale.shape[1]
        return f"the weight was not prepared, or its {n} outputs are no multiple of {PACKED}"
    return None if limit > 0 else f"limit is {limit}, of which the operator makes no limit"


def _why_no_int8_fused(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    limit: float,
) -> str | None:
    n, k = weight_scale.shape[1], x.shape[1]
    if n > MAX_N or k >= MAX_K:
        return f"the weight is {n} x {k}, must be at most {MAX_N} x {MAX_K - 1}"
    return _why_no_first(weight, weight_scale, limit, int4=False)


@grouped_int8_gemm_swiglu.kernel("ascend", provider="_C_ascend", why_not=_why_no_int8_fused)
def grouped_matmul_swiglu_quant(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 experts, the ends of whose rows the operator counts."""
    if not x.shape[0]:
        return _no_rows(x, weight_scale)
    (matrix,) = prepared.get(weight_scale, FIRST)
    values, scales, _ = c_ascend("grouped_matmul_swiglu_quant")(
        x, matrix, weight_scale, x_scale, group_sizes.cumsum(0), swiglu_limit=limit
    )
    return values, scales


def _why_no_int4_fused(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    limit: float,
) -> str | None:
    return _why_no_first(weight, weight_scale, limit, int4=True)


@grouped_int8_gemm_swiglu.kernel("ascend", provider="_C_ascend", why_not=_why_no_int4_fused)
def grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT4 experts: what the halves of an activation lack comes as the assist matrix."""
    if not x.shape[0]:
        return _no_rows(x, weight_scale)
    packed, scale, assist = prepared.get(weight_scale, FIRST)
    values, scales = c_ascend("grouped_matmul_swiglu_quant_v2")(
        x,
        [packed],
        [scale],
        x_scale,
        group_sizes,
        None,  # no smoothing
        [assist],
        None,  # no bias
        group_list_type=COUNTS,
        swiglu_limit=limit,
    )
    return values, scales


@grouped_int8_gemm_swiglu.kernel("ascend", provider="torch_npu", why_not=_why_no_int8_fused)
def grouped_matmul_to_int32(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock product leaves whole sums, as fp32 is more than it returns; torch does the rest."""
    if not x.shape[0]:
        return _no_rows(x, weight_scale)
    (matrix,) = prepared.get(weight_scale, FIRST)
    (sums,) = torch_npu().npu_grouped_matmul(
        x=[x],
        weight=[matrix],
        split_item=ONE_OUTPUT,
        group_type=BY_ROWS,
        group_list=group_sizes,
        group_list_type=COUNTS,
        output_dtype=torch.int32,
    )
    row = torch.arange(len(x), device=x.device)
    expert = torch.bucketize(row, group_sizes.cumsum(0), right=True)
    product = sums.float() * weight_scale[expert] * x_scale.unsqueeze(-1)
    return quantize_int8(swiglu.reference(product, limit, None))


@grouped_int8_gemm_swiglu.kernel("ascend", provider="torch_npu", why_not=_why_no_int4_fused)
def grouped_matmul_int4_to_bf16(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock product of INT4 returns bf16 at most: one rounding more than the operator's."""
    if not x.shape[0]:
        return _no_rows(x, weight_scale)
    packed, scale, bias = prepared.get(weight_scale, FIRST)
    (product,) = torch_npu().npu_grouped_matmul(
        x=[x],
        weight=[packed],
        scale=[scale.unsqueeze(1)],
        bias=[bias],
        per_token_scale=[x_scale],
        split_item=ONE_OUTPUT,
        group_type=BY_ROWS,
        group_list=group_sizes,
        group_list_type=COUNTS,
        output_dtype=torch.bfloat16,
    )
    return quantize_int8(swiglu.reference(product.float(), limit, None))


def _no_rows(x: torch.Tensor, weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(0, weight_scale.shape[1] // 2, dtype=torch.int8, device=x.device)
    return values, torch.empty(0, device=x.device)
