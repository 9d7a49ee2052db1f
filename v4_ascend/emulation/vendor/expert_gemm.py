"""An expert layer's first product, its activation and its quantiser in one operator.

Sources: vllm-ascend grouped_matmul_swiglu_quant, and of v2 the page of CANN's
aclnnGroupedMatmulSwigluQuantWeightNzV2; op-plugin
npu_grouped_matmul_swiglu_quant_v2.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor import formats
from v4_ascend.emulation.vendor.gemm import SUMS, groups_of, int8_by_int4, mx_operands, only
from v4_ascend.emulation.vendor.norm import swiglu

PER_TOKEN, MX = 0, 2  # dequant_mode and quant_mode
MAX_GROUPS = 1024
MAX_N, MAX_K = 10240, 65536  # of int8 on A2 and A3
MX_N = 128  # n of MX is a multiple
# torch_npu's numbers beside torch's, and the 0 that A2's and A3's part of the page calls int8.
INT8 = (0, formats.SCALAR_INT8)
E4M3 = (formats.SCALAR_E4M3, formats.ACL_E4M3)
FP32 = (0, formats.SCALAR_FP32)


@stand_in("_C_ascend::grouped_matmul_swiglu_quant", ("a2", "a3"))
def grouped_matmul_swiglu_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grouped int8 product, limited swiglu, int8 again: [m, n/2], factors [m], and nothing.

    Shapes: x [m, k] int8, weight [e, k, n] int8, weight_scale [e, n], x_scale [m] fp32,
    group_list [e] cumulative. Rows of no expert are 0 with factor NaN.
    """
    check = Checks("grouped_matmul_swiglu_quant", "vllm-ascend grouped_matmul_swiglu_quant")
    return (
        *_swiglu_quant(check, x, weight, weight_scale, x_scale, group_list, SUMS, swiglu_limit),
        torch.empty(()),
    )


@stand_in("_C_ascend::grouped_matmul_swiglu_quant_v2", ("a2", "a3"))
def grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    smooth_scale: torch.Tensor | None,
    weight_assist_matrix: Sequence[torch.Tensor] | None,
    bias: torch.Tensor | None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 0,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 0,
    transpose_weight: bool = False,
    group_list_type: int = 0,
    tuning_config: Sequence[int] = (),
    swiglu_limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `grouped_matmul_swiglu_quant` with lists and both kinds of group_list, and with INT4.

    INT4 weights are int32 [e, k, n / 8], with weight_scale int64 [e, n], fp32 in its low halves,
    and weight_assist_matrix fp32 [e, n]: 8 times the sums of a column's values times its scale.
    """
    check = Checks("grouped_matmul_swiglu_quant_v2", "vllm-ascend grouped_matmul_swiglu_quant_v2")
    check.one_of((0,), dequant_mode=dequant_mode, quant_mode=quant_mode)
    others = smooth_scale is None and bias is None
    check.need(others, "smooth_scale or bias", "given", "int4 activations are not emulated")
    matrix, scale = only(check, "weight", weight), only(check, "weight_scale", weight_scale)
    assert matrix is not None
    assert scale is not None
    assist = only(check, "weight_assist_matrix", weight_assist_matrix)
    if matrix.dtype == torch.int32:
        check.given(weight_assist_matrix=assist)
        assert assist is not None
        check.one_of((False,), transpose_weight=transpose_weight)
        check.dtype(torch.int8, x=x)
        groups = groups_of(check, group_list, group_list_type, len(matrix), len(x))
        product = int8_by_int4(check, x, matrix, scale, x_scale, assist, groups)
        values = torch.zeros(len(x), product.shape[1] // 2, dtype=torch.int8)
        factors = torch.full((len(x),), float("nan"))
        theirs = slice(0, groups[-1].stop)
        act = swiglu(product[theirs], swiglu_limit)
        values[theirs], factors[theirs] = formats.per_token(act, torch.int8)
        return values, factors
    check.need(assist is None, "weight_assist_matrix", "given", "it is for int4 weights")
    matrix = matrix.transpose(1, 2) if transpose_weight else matrix
    return _swiglu_quant(
        check, x, matrix, scale, x_scale, group_list, group_list_type, swiglu_limit
    )


@stand_in("npu::npu_grouped_matmul_swiglu_quant_v2")
def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    smooth_scale: torch.Tensor | None = None,
    weight_assist_matrix: Sequence[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``silu(gate) up`` of each expert's product, quantised, and its factors.

    By token: x and weight int8, or e4m3 on 950; factors fp32 [m]. MX, on 950: x and weight e4m3
    with scales [m, ceil(k/64), 2] and [e, ceil(k/64), n, 2]; scale bytes [m, ceil(n/128), 2].
    There is no limit of the activation. Rows of no expert are 0, their factors NaN or bytes 0.
    """
    check = Checks(
        "npu_grouped_matmul_swiglu_quant_v2", "op-plugin npu_grouped_matmul_swiglu_quant_v2.md"
    )
    matrix, scale = only(check, "weight", weight), only(check, "weight_scale", weight_scale)
    check.given(weight=matrix, weight_scale=scale)
    assert matrix is not None
    assert scale is not None
    check.shape(None, None, None, weight=matrix)
    check.need(len(matrix) <= MAX_GROUPS, "e", len(matrix), f"at most {MAX_GROUPS}")
    check.need(bias is None, "bias", "given", "it must be None")
    others = smooth_scale is None and not weight_assist_matrix
    check.need(others, "smooth_scale or assist", "given", "int4 weights are not emulated")
    named = x_dtype is None and weight_dtype is None
    check.need(named, "x_dtype or weight_dtype", "given", "hifloat8 and fp4 are not emulated")
    on_950 = running_on().generation == "950"
    check.one_of((PER_TOKEN, MX) if on_950 else (PER_TOKEN,), dequant_mode=dequant_mode)
    check.one_of((dequant_mode,), quant_mode=quant_mode)
    check.one_of(FP32, dequant_dtype=dequant_dtype)
    kind = group_list_type or 0
    if dequant_mode == MX:
        named_scales = (weight_scale_dtype, x_scale_dtype)
        check.one_of(((formats.ACL_E8M0,) * 2,), **{"the scales' dtypes": named_scales})
        check.one_of(E4M3, quant_dtype=quant_dtype)
        return _mx_swiglu_quant(check, x, matrix, scale, x_scale, group_list, kind)
    narrow = x.dtype == torch.int8
    check.need(narrow or on_950, "x.dtype", x.dtype, "it must be int8")
    check.one_of(INT8 if narrow else E4M3, quant_dtype=quant_dtype)
    if not on_950:
        n, k = matrix.shape[2], x.shape[-1]
        check.need(n <= MAX_N and k < MAX_K, "(n, k)", (n, k), f"n to {MAX_N}, k below {MAX_K}")
    dtype = torch.int8 if narrow else formats.FP8
    return _swiglu_quant(check, x, matrix, scale, x_scale, group_list, kind, 0.0, dtype)


def _mx_swiglu_quant(
    check: Checks,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    group_list_type: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise as the page's formula, whose log2 OCP and CANN's other MX pages round down."""
    check.dtype(formats.FP8, x=x, weight=weight)
    check.shape(None, None, x=x)
    e, _, n = weight.shape
    check.need(n % MX_N == 0, "n", n, f"it must be a multiple of {MX_N}")
    a, b = mx_operands(check, x, x_scale, weight, weight_scale)
    act = torch.zeros(len(x), n // 2)
    for i, mine in enumerate(groups_of(check, group_list, group_list_type, e, len(x))):
        act[mine] = swiglu(a[mine] @ b[i], 0.0)
    return formats.mx_quant(act, fp4=False)


def _swiglu_quant(
    check: Checks,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    group_list_type: int,
    swiglu_limit: float,
    dtype: torch.dtype = torch.int8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise by token; `dtype` is that of x, of weight and of what comes out."""
    check.dtype(dtype, x=x, weight=weight)
    check.shape(None, None, x=x)
    check.shape(None, x.shape[1], None, weight=weight)
    e, _, n = weight.shape
    check.shape(e, n, weight_scale=weight_scale)
    check.dtype(torch.float32, torch.bfloat16, weight_scale=weight_scale)
    check.shape(len(x), x_scale=x_scale)
    check.dtype(torch.float32, x_scale=x_scale)
    values = torch.zeros(len(x), n // 2, dtype=dtype)
    factors = torch.full((len(x),), float("nan"))
    for i, mine in enumerate(groups_of(check, group_list, group_list_type, e, len(x))):
        product = (x[mine].float() @ weight[i].float()) * weight_scale[i].float()
        act = swiglu(product * x_scale[mine].unsqueeze(-1), swiglu_limit)
        values[mine], factors[mine] = formats.per_token(act, dtype)
    return values, factors
