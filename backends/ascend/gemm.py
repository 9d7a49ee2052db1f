"""Matrix products with MX scales on 950; bf16 experts everywhere.

V4's activations have one scale per 128 channels and its fp8 weights one per 128 x 128; both
are powers of two, so repeating them for groups of 32, as MX wants, changes no value.
"""

from __future__ import annotations

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.custom_ops import torch_npu
from v4_ascend.backends.ascend.layouts import store_in_tiles
from v4_ascend.ops import fp4_gemm, fp8_gemm, grouped_gemm
from v4_ascend.ops.formats import E8M0, ceil_to_e8m0, is_mx, scale_to_float
from v4_ascend.ops.gemm import ACT_GROUP

MX_PAIR = 64  # channels of two scales of 32, which lie side by side
MX_GROUPS = [1, 1, 32]
BLOCK = 128
MAX_DIM = 65536  # of a weight, for npu_quant_matmul
COUNTS, ONE_OUTPUT, BY_ROWS = 1, 2, 0  # group_list_type, split_item, group_type
MX_SCALE = "MX scale"  # of a weight's scale: uint8 [.., k / 64, n, 2]


def _block_scale(scale: torch.Tensor, n: int) -> torch.Tensor | None:
    """Spread scales [.., n / 128, k / 128]; None unless they are powers of two."""
    if scale.dtype != E8M0:
        narrow = ceil_to_e8m0(scale)
        if not bool((scale_to_float(narrow) == scale).all()):
            return None
        scale = narrow
    rows = scale.view(torch.uint8).repeat_interleave(BLOCK, -2)[..., :n, :]
    pairs = rows.repeat_interleave(BLOCK // MX_PAIR, -1).transpose(-1, -2)
    return pairs.unsqueeze(-1).expand(*pairs.shape, 2).contiguous()


def _group_scale(scale: torch.Tensor) -> torch.Tensor:
    """Arrange scales [.., n, k / 32] by pairs."""
    pairs = scale.view(torch.uint8).unflatten(-1, (-1, 2))
    return pairs.transpose(-2, -3).contiguous()


def _act_scale(scale: torch.Tensor) -> torch.Tensor:
    """Spread scales [m, k / 128] to pairs [m, k / 64, 2]."""
    pairs = scale.view(torch.uint8).repeat_interleave(ACT_GROUP // MX_PAIR, -1)
    return pairs.unsqueeze(-1).expand(*pairs.shape, 2).contiguous().view(E8M0)


@fp8_gemm.preparation("ascend")
def keep_fp8_scale(b: torch.Tensor, b_scale: torch.Tensor) -> None:
    """Keep the MX layout of a weight's block scales; the weight lies in tiles."""
    made = _group_scale(b_scale) if is_mx(b, b_scale) else _block_scale(b_scale, b.shape[0])
    if made is not None:
        prepared.keep(b_scale, MX_SCALE, made)
        store_in_tiles(b)


@fp4_gemm.preparation("ascend")
def keep_fp4_scale(b: torch.Tensor, b_scale: torch.Tensor) -> None:
    """Keep the MX layout of a weight's group scales."""
    prepared.keep(b_scale, MX_SCALE, _group_scale(b_scale))


@grouped_gemm.preparation("ascend")
def keep_experts_scale(weight: torch.Tensor, weight_scale: torch.Tensor | None) -> None:
    """Keep the MX layout of all experts' scales."""
    if weight_scale is None:
        return
    is_grouped = weight.dtype == torch.int8 or is_mx(weight, weight_scale)
    made = _group_scale(weight_scale) if is_grouped else _block_scale(weight_scale, weight.shape[1])
    if made is not None:
        prepared.keep(weight_scale, MX_SCALE, made)


def _why_no_mx(
    a_scale: torch.Tensor | None, b_scale: torch.Tensor | None, out_dtype: torch.dtype
) -> str | None:
    if out_dtype != torch.bfloat16:
        return f"out_dtype is {out_dtype}, must be bf16"
    if a_scale is None or b_scale is None:
        return "no scales, MX needs them"
    if a_scale.dtype != E8M0:
        return f"activation scales are {a_scale.dtype}, must be e8m0"
    if not prepared.has(b_scale, MX_SCALE):
        return "the weight's scale was not prepared, or is not a power of two"
    return None


def _why_no_fp8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if max(b.shape) >= MAX_DIM:
        return f"the weight is {list(b.shape)}, must be below {MAX_DIM}"
    return _why_no_mx(a_scale, b_scale, out_dtype)


@fp8_gemm.kernel("ascend", provider="torch_npu", why_not=_why_no_fp8)
def quant_matmul_mx(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply as MXFP8."""
    if not a.shape[0]:
        return torch.empty(0, b.shape[0], dtype=out_dtype, device=a.device)
    npu = torch_npu()
    y: torch.Tensor = npu.npu_quant_matmul(
        a,
        b.T,
        prepared.get(b_scale, MX_SCALE).view(E8M0),
        pertoken_scale=_act_scale(a_scale),
        output_dtype=out_dtype,
        pertoken_scale_dtype=npu.float8_e8m0fnu,  # its own number: torch's is refused when traced
        scale_dtype=npu.float8_e8m0fnu,
        group_sizes=MX_GROUPS,
    )
    return y


def _why_no_fp4(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    return _why_no_mx(a_scale, b_scale, out_dtype)


@fp4_gemm.kernel("ascend", provider="torch_npu", why_not=_why_no_fp4)
def one_group_matmul_fp4(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply with an fp4 weight as the only expert."""
    scale = prepared.get(b_scale, MX_SCALE).unsqueeze(0)
    sizes = torch.full((1,), a.shape[0], dtype=torch.int64, device=a.device)
    return _grouped(a, a_scale, b.unsqueeze(0), scale, sizes, out_dtype)


def _why_no_experts(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if weight_scale is None:
        return f"the weight is {weight.dtype} without scales, must be fp8 or fp4"
    return _why_no_mx(x_scale, weight_scale, out_dtype)


@grouped_gemm.kernel("ascend", provider="torch_npu", why_not=_why_no_experts)
def grouped_matmul_mx(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply all experts' rows in one call, fp8 by fp8 or by fp4."""
    if x_scale is None or weight_scale is None:
        raise ValueError("grouped_matmul_mx: no scales; `why_not` refuses such a call")
    scale = prepared.get(weight_scale, MX_SCALE)
    return _grouped(x, x_scale, weight, scale, group_sizes, out_dtype)


def _grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if not x.shape[0]:
        return torch.empty(0, weight.shape[1], dtype=out_dtype, device=x.device)
    npu = torch_npu()
    if weight.dtype == torch.int8:
        by_format = {
            "weight": [weight.view(torch.uint8).transpose(1, 2)],
            "antiquant_scale": [scale.view(E8M0)],
            "weight_dtype": npu.float4_e2m1fn_x2,
        }
    else:
        by_format = {
            "weight": [weight.transpose(1, 2)],
            "scale": [scale.view(E8M0)],
            "scale_dtype": npu.float8_e8m0fnu,
        }
    (y,) = npu.npu_grouped_matmul(
        x=[x],
        per_token_scale=[_act_scale(x_scale)],
        per_token_scale_dtype=npu.float8_e8m0fnu,
        split_item=ONE_OUTPUT,
        group_type=BY_ROWS,
        group_list=group_sizes,
        group_list_type=COUNTS,
        output_dtype=out_dtype,
        **by_format,
    )
    return y


def _why_no_plain_experts(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    bf16 = torch.bfloat16
    if (x.dtype, weight.dtype, out_dtype) != (bf16, bf16, bf16):
        return f"x, weight, out are {x.dtype}, {weight.dtype}, {out_dtype}, must be bf16"
    return None


@grouped_gemm.kernel("ascend", provider="torch_npu", why_not=_why_no_plain_experts)
def grouped_matmul_bf16(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply all experts' rows in one call, in bf16."""
    if not x.shape[0]:
        return torch.empty(0, weight.shape[1], dtype=out_dtype, device=x.device)
    (y,) = torch_npu().npu_grouped_matmul(
        x=[x],
        weight=[weight.transpose(1, 2)],
        split_item=ONE_OUTPUT,
        group_type=BY_ROWS,
        group_list=group_sizes,
        group_list_type=COUNTS,
    )
    return y
