"""INT8 matrix products: A2, A3 and 950; INT4 weights on A2 and A3.

The kernel for INT4 splits an int8 activation into 16 times its high half and its low half, takes 8
from the low half to make it signed, and adds what that takes away as a bias of each output channel.
"""

from __future__ import annotations

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.custom_ops import torch_npu
from v4_ascend.backends.ascend.gemm import BY_ROWS, COUNTS, MAX_DIM, ONE_OUTPUT
from v4_ascend.backends.ascend.layouts import store_in_tiles
from v4_ascend.backends.ascend.soc import A5, current_chip
from v4_ascend.ops import grouped_int8_gemm, int8_act_quant, int8_gemm
from v4_ascend.ops.formats import unpack_int4_rows
from v4_ascend.ops.int8 import is_int4

LOW_HALF = 8
PACKED = 8  # int4 values of an int32, along the outputs
INT4 = "INT4 weight"  # of experts: weight int32 [e, k, n / 8], scale int64 [e, 1, n], bias [e, n]


def _why_no_quant(x: torch.Tensor) -> str | None:
    return None if x.dtype == torch.bfloat16 else f"x is {x.dtype}, must be bf16"


@int8_act_quant.kernel("ascend", provider="torch_npu", why_not=_why_no_quant)
def dynamic_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each token."""
    if not x.shape[0]:
        scale = torch.empty(0, dtype=torch.float32, device=x.device)
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale
    values, scale = torch_npu().npu_dynamic_quant(x)
    return values, scale


def _why_no_int8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if max(b.shape) >= MAX_DIM:
        return f"the weight is {list(b.shape)}, must be below {MAX_DIM}"
    return _why_not_bf16(out_dtype)


def _why_not_bf16(out_dtype: torch.dtype) -> str | None:
    return None if out_dtype == torch.bfloat16 else f"out_dtype is {out_dtype}, must be bf16"


@int8_gemm.preparation("ascend")
def lay_out_int8(b: torch.Tensor, b_scale: torch.Tensor) -> None:
    """Let the weight lie in tiles."""
    store_in_tiles(b)


@int8_gemm.kernel("ascend", provider="torch_npu", why_not=_why_no_int8)
def quant_matmul_int8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply by a weight that lies transposed, in tiles."""
    if not a.shape[0]:
        return torch.empty(0, b.shape[0], dtype=out_dtype, device=a.device)
    y: torch.Tensor = torch_npu().npu_quant_matmul(
        a, b.T, b_scale, pertoken_scale=a_scale, output_dtype=out_dtype
    )
    return y


@grouped_int8_gemm.preparation("ascend")
def lay_out_experts(weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    """Keep INT4 experts as the kernel reads them, as the weight itself then shows them.

    INT8 ones of A2 and A3 lie in tiles.
    """
    if not is_int4(weight, weight_scale):
        if current_chip() != A5:
            store_in_tiles(weight)
        return
    if weight_scale.shape[1] % PACKED:
        return
    packed, scale, bias = packed_int4(weight, weight_scale)
    prepared.keep(weight_scale, INT4, (packed, scale.unsqueeze(1), bias))
    weight.data = packed.view(torch.int8).transpose(1, 2)


def fp32_in_low_half(scale: torch.Tensor) -> torch.Tensor:
    """Return fp32 factors as some operators take them: in the low halves of int64."""
    return scale.view(torch.int32).long() & 0xFFFFFFFF


def packed_int4(
    weight: torch.Tensor, weight_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a kernel's weight int32 [e, k, n / 8], scale int64 [e, n] and bias [e, n]."""
    packed = weight.transpose(1, 2).contiguous().view(torch.int32)
    sums = [unpack_int4_rows(w).sum(-1, dtype=torch.float32) for w in weight]
    return packed, fp32_in_low_half(weight_scale), LOW_HALF * torch.stack(sums) * weight_scale


def _why_no_int8_experts(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if is_int4(weight, weight_scale):
        return "the weight is int4"
    return _why_not_bf16(out_dtype)


@grouped_int8_gemm.kernel("ascend", provider="torch_npu", why_not=_why_no_int8_experts)
def grouped_matmul_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply all experts' rows in one call."""
    if not x.shape[0]:
        return torch.empty(0, weight.shape[1], dtype=out_dtype, device=x.device)
    stored = {"weight": [weight.transpose(1, 2)], "scale": [weight_scale]}
    return _grouped(x, x_scale, stored, group_sizes, out_dtype)


def _why_no_int4_experts(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if not is_int4(weight, weight_scale):
        return "the weight is int8"
    if not prepared.has(weight_scale, INT4):
        n = weight_scale.shape[1]
        return f"the weight was not prepared, or its {n} outputs are no multiple of {PACKED}"
    return _why_not_bf16(out_dtype)


@grouped_int8_gemm.kernel("ascend", provider="torch_npu", why_not=_why_no_int4_experts)
def grouped_matmul_int4(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply all experts' rows in one call."""
    if not x.shape[0]:
        return torch.empty(0, weight_scale.shape[1], dtype=out_dtype, device=x.device)
    packed, scale, bias = prepared.get(weight_scale, INT4)
    stored = {"weight": [packed], "scale": [scale], "bias": [bias]}
    return _grouped(x, x_scale, stored, group_sizes, out_dtype)


def _grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    stored: dict[str, list[torch.Tensor]],
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    (y,) = torch_npu().npu_grouped_matmul(
        x=[x],
        **stored,
        per_token_scale=[x_scale],
        split_item=ONE_OUTPUT,
        group_type=BY_ROWS,
        group_list=group_sizes,
        group_list_type=COUNTS,
        output_dtype=out_dtype,
    )
    return y
