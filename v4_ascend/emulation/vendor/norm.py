"""Norms, rotation, activation and dynamic quantisation.

Sources: op-plugin docs of each npu_*; vllm-ascend torch_binding.cpp for `_C_ascend`.
"""

from __future__ import annotations

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor import formats
from v4_ascend.emulation.vendor.compressor import rotate_interleaved

HALVES = (torch.bfloat16, torch.float16)


def _rms(x: torch.Tensor, gamma: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return x.float() * rstd * gamma.float(), rstd


@stand_in("npu::npu_rms_norm")
def npu_rms_norm(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed rows, dtype of input, and 1 / rms fp32 [..., 1]."""
    check = Checks("npu_rms_norm", "op-plugin npu_rms_norm.md")
    check.dtype(*HALVES, torch.float32, input=input)
    check.dtype(input.dtype, torch.float32, gamma=gamma)
    check.shape(input.shape[-1], gamma=gamma)
    y, rstd = _rms(input, gamma, epsilon)
    return y.to(input.dtype), rstd


@stand_in("_C_ascend::npu_rms_norm_dynamic_quant", ("a2", "a3"))
def npu_rms_norm_dynamic_quant(
    x: torch.Tensor,
    gamma: torch.Tensor,
    smooth_scale: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed rows in int8 and their factors fp32 [...]."""
    check = Checks("npu_rms_norm_dynamic_quant", "vllm-ascend rms_norm_dynamic_quant")
    check.dtype(*HALVES, x=x)
    check.dtype(x.dtype, gamma=gamma, smooth_scale=smooth_scale, beta=beta)
    check.shape(x.shape[-1], gamma=gamma, smooth_scale=smooth_scale, beta=beta)
    y, _ = _rms(x, gamma, epsilon)
    if beta is not None:
        y = y + beta.float()
    if smooth_scale is not None:
        y = y * smooth_scale.float()
    return formats.per_token(y, torch.int8)


@stand_in("npu::npu_add_rms_norm_dynamic_mx_quant", ("950",))
def npu_add_rms_norm_dynamic_mx_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    *,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    scale_alg: int = 0,
    round_mode: str = "rint",
    dst_type: int = 296,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normed sum in MXFP8 or MXFP4, the sum, the scale bytes, and 1 / rms [..., 1].

    1 / rms as torch_npu 2.13's Meta kernel has it; newer pages leave it empty without gradients.
    `scale_alg` 0 rounds a scale down as OCP does, 1 (fp8 alone) up so that nothing saturates.
    """
    check = Checks(
        "npu_add_rms_norm_dynamic_mx_quant", "op-plugin npu_add_rms_norm_dynamic_mx_quant.md"
    )
    check.dtype(*HALVES, x1=x1)
    check.dtype(x1.dtype, x2=x2)
    check.need(1 <= x1.dim() <= 7, "x1.dim()", x1.dim(), "1 to 7 dims")
    check.shape(*x1.shape, x2=x2)
    check.shape(x1.shape[-1], gamma=gamma, beta=beta)
    check.dtype(x1.dtype, torch.float32, gamma=gamma)
    check.dtype(gamma.dtype, beta=beta)
    check.one_of(("rint",), round_mode=round_mode)
    kind = _destination(check, dst_type, formats.ACL_FP4)
    check.one_of((formats.ACL_E4M3, formats.ACL_FP4), dst_type=kind)
    fp4 = kind == formats.ACL_FP4
    check.one_of((0,) if fp4 else (0, 1), scale_alg=scale_alg)
    even = x1.shape[-1] % 2 == 0
    check.need(even or not fp4, "x1.shape[-1]", x1.shape[-1], "even for fp4")
    total = x1.float() + x2.float()
    y, rstd = _rms(total, gamma, epsilon)
    if beta is not None:
        y = y + beta.float()
    values, scale = formats.mx_quant(y, fp4, round_up=scale_alg == 1)
    return values, total.to(x1.dtype), scale, rstd


@stand_in("npu::npu_interleave_rope")
def npu_interleave_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbours of x [B, N, S, 64]: firsts in the front half, seconds behind.

    Unlike `npu_rotary_mul` it leaves them apart: pairs come out as halves.
    """
    check = Checks("npu_interleave_rope", "op-plugin npu_interleave_rope.md")
    on_950 = running_on().generation == "950"
    check.dtype(*HALVES, *((torch.float32,) if on_950 else ()), x=x)
    check.dtype(x.dtype, cos=cos, sin=sin)
    check.shape(None, None, None, 64, x=x)
    batch, _, steps, width = x.shape
    rows = 1 if cos.dim() == 4 and cos.shape[2] == 1 else steps
    check.shape(batch, 1, rows, width, cos=cos, sin=sin)
    if not on_950:
        check.contiguous(x=x, cos=cos, sin=sin)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    apart, turned = torch.cat((first, second), -1), torch.cat((-second, first), -1)
    return (apart * cos.float() + turned * sin.float()).to(x.dtype)


@stand_in("npu::npu_rotary_mul")
def npu_rotary_mul(
    input: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``input r1 + rotated(input) r2``; r1 and r2 broadcast."""
    check = Checks("npu_rotary_mul", "op-plugin npu_rotary_mul.md")
    check.one_of(("half", "interleave"), rotary_mode=rotary_mode)
    check.need(input.dim() == 4, "input.dim()", input.dim(), "4 dims")
    check.shape(None, None, None, input.shape[-1], r1=r1)
    check.shape(*r1.shape, r2=r2)
    check.dtype(input.dtype, r1=r1, r2=r2)
    check.need(rotate is None, "rotate", "given", "it is not emulated")
    if rotary_mode == "interleave":
        return rotate_interleaved(input, r1, r2).to(input.dtype)
    first, second = input.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (input.float() * r1.float() + turned * r2.float()).to(input.dtype)


def _destination(check: Checks, dst_type: int | None, default: int) -> int:
    """Fold the two ways of naming a format into torch_npu's numbers; 1 is int8."""
    named = {
        None: default,
        formats.SCALAR_INT8: 1,
        formats.SCALAR_E4M3: formats.ACL_E4M3,
        formats.ACL_E4M3: formats.ACL_E4M3,
        formats.ACL_FP4: formats.ACL_FP4,
    }
    check.one_of(tuple(named), dst_type=dst_type)
    return named[dst_type]


@stand_in("npu::npu_dynamic_quant")
def npu_dynamic_quant(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows to int8, or e4m3 on 950; factors fp32 [...]."""
    check = Checks("npu_dynamic_quant", "op-plugin npu_dynamic_quant.md")
    check.dtype(*HALVES, input=input)
    check.one_of(("pertoken",), quant_mode=quant_mode)
    check.need(group_index is None, "group_index", "given", "it is not emulated")
    check.one_of((0.0,), dst_type_max=dst_type_max)
    kind = _destination(check, dst_type, 1)
    fp8 = kind == formats.ACL_E4M3
    check.one_of((1, formats.ACL_E4M3), dst_type=kind)
    on_950 = running_on().generation == "950"
    check.need(not fp8 or on_950, "dst_type", dst_type, "fp8 is 950 only")
    check.shape(input.shape[-1], smooth_scales=smooth_scales)
    x = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    return formats.per_token(x, formats.FP8 if fp8 else torch.int8)


@stand_in("npu::npu_dynamic_mx_quant", ("950",))
def npu_dynamic_mx_quant(
    input: torch.Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise groups of 32 to MXFP8 or MXFP4; scale bytes [..., ceil(n / 64), 2]."""
    check = Checks("npu_dynamic_mx_quant", "op-plugin npu_dynamic_mx_quant.md")
    check.dtype(*HALVES, input=input)
    check.one_of((-1, input.dim() - 1), axis=axis)
    check.one_of(("rint",), round_mode=round_mode)
    check.one_of((32,), block_size=block_size)
    check.one_of((0,), scale_alg=scale_alg)
    kind = _destination(check, dst_type, formats.ACL_FP4)
    check.one_of((formats.ACL_E4M3, formats.ACL_FP4), dst_type=kind)
    even = input.shape[-1] % 2 == 0
    check.need(even or kind != formats.ACL_FP4, "input.shape[-1]", input.shape[-1], "even for fp4")
    return formats.mx_quant(input, kind == formats.ACL_FP4)


@stand_in("_C_ascend::npu_swiglu_group_quant", ("950",))
def npu_swiglu_group_quant(
    x: torch.Tensor,
    topk_weight: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype = torch.float8_e4m3fn,
    quant_mode: int = 1,
    group_size: int = 128,
    round_scale: bool = False,
    ue8m0_scale: bool = False,
    output_origin: bool = False,
    group_list_type: int = 0,
    clamp_value: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return swiglu of x [T, 2 I] in e4m3 [T, I], its factors per 128 channels, and itself.

    The gate (first half) is limited above, the other half on both sides, by clamp_value;
    topk_weight [T] or [T, 1] multiplies the product. Without output_origin nothing is written
    to the third.
    """
    check = Checks(
        "npu_swiglu_group_quant", "cann-recipes npu_swiglu_group_quant, torch_binding.cpp"
    )
    check.dtype(*HALVES, x=x)
    check.shape(None, None, x=x)
    check.one_of((torch.float8_e4m3fn,), dst_type=dst_type)
    check.one_of((1,), quant_mode=quant_mode)
    check.one_of((128,), group_size=group_size)
    check.need(x.shape[1] % 256 == 0, "x.shape[1]", x.shape[1], "two halves of whole groups of 128")
    check.need(not ue8m0_scale, "ue8m0_scale", True, "factors of quant_mode 1 are fp32")
    check.dtype(torch.float32, topk_weight=topk_weight)
    if topk_weight is not None:
        check.need(
            topk_weight.numel() == len(x),
            "topk_weight.shape",
            list(topk_weight.shape),
            f"{len(x)} rows",
        )
    y = swiglu(x.float(), clamp_value)
    if topk_weight is not None:
        y = y * topk_weight.reshape(-1, 1)
    groups = y.unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1)
    if round_scale:
        scale = formats.power_of_two_scale(largest, formats.FP8_MAX)
    else:
        scale = largest.clamp_min(1e-4) / formats.FP8_MAX
    values = formats.to_fp8(groups / scale.unsqueeze(-1)).flatten(-2)
    unwritten = torch.full(y.shape, torch.nan, dtype=x.dtype)
    return values, scale, y.to(x.dtype) if output_origin else unwritten


def swiglu(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Return silu(gate) * up of [..., gate | up], limited as V4 does if `limit` is not 0."""
    gate, up = x.chunk(2, -1)
    if limit > 0:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up
