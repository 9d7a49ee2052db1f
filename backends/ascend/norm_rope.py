"""RMSNorm and the rotation of the last 64 channels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.custom_ops import c_ascend, torch_npu
from v4_ascend.ops import head_rms_norm, rms_norm, rms_norm_int8, rope, rope_inverse
from v4_ascend.ops.formats import quantize_int8

GAMMA = "bf16 gamma"  # of a norm's weight
MAX_ROPE_DIM = 896  # of npu_rotary_mul; V4 rotates 64 channels


def _why_no_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    if weight.dtype != torch.float32:
        return f"weight is {weight.dtype}, must be fp32"
    return None


@rms_norm.kernel("ascend", provider="torch_npu", why_not=_why_no_norm)
def npu_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm in fp32: with a narrower gamma the operator would round it first."""
    if not x.numel():
        return torch.empty_like(x)
    y, _ = torch_npu().npu_rms_norm(x.float().contiguous(), weight, eps)
    return y.to(x.dtype)


@rms_norm_int8.preparation("ascend")
def keep_gamma(weight: torch.Tensor) -> None:
    """Keep the weight in bf16, if that is what the checkpoint had."""
    narrow = weight.bfloat16()
    if bool((narrow == weight).all()):
        prepared.keep(weight, GAMMA, narrow)


def _why_no_int8_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, must be bf16"
    if not prepared.has(weight, GAMMA):
        return "weight was not prepared, or has values that bf16 does not hold"
    return None


@rms_norm_int8.kernel("ascend", provider="_C_ascend", why_not=_why_no_int8_norm)
def rms_norm_dynamic_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and quantise in one call."""
    if not x.numel():
        return quantize_int8(x)
    values, scales = c_ascend("npu_rms_norm_dynamic_quant")(
        x.contiguous(), prepared.get(weight, GAMMA), epsilon=eps
    )
    return values, scales


@rms_norm_int8.kernel("ascend", provider="torch_npu", why_not=_why_no_norm)
def npu_rms_norm_int8(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm in fp32, which the stock quantiser does not take: torch quantises."""
    if not x.numel():
        return quantize_int8(x)
    y, _ = torch_npu().npu_rms_norm(x.float().contiguous(), weight, eps)
    return quantize_int8(y)


@head_rms_norm.kernel("ascend", provider="torch_npu")
def npu_head_rms_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm every head in fp32, with a gamma of ones."""
    if not q.numel():
        return torch.empty_like(q)
    ones = torch.ones(q.shape[-1], device=q.device)
    y, _ = torch_npu().npu_rms_norm(q.float().contiguous(), ones, eps)
    return y.to(q.dtype)


def _why_no_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    turned = 2 * cos.shape[-1]
    if turned > MAX_ROPE_DIM or turned > x.shape[-1]:
        return f"{turned} of {x.shape[-1]} channels turn, must be at most {MAX_ROPE_DIM}"
    if cos.dtype != torch.float32:
        return f"cos is {cos.dtype}, must be fp32"
    return None


def _rotate(
    turn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Turn the last channels in fp32: bf16 tables would be wrong at long contexts."""
    if not x.numel():
        return x.clone()
    width = 2 * cos.shape[-1]
    # [n_tokens, 1, n_heads, width] and a table per token, each angle once per channel.
    part = x[..., -width:].to(torch.float32, copy=True).reshape(x.shape[0], 1, -1, width)
    wide = [t.repeat_interleave(2, -1).view(x.shape[0], 1, 1, width) for t in (cos, sin)]
    turned = turn(part, *wide).view(*x.shape[:-1], width).to(x.dtype)
    return torch.cat((x[..., :-width], turned), dim=-1)


def _in_place(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    c_ascend("inplace_partial_rotary_mul")(
        part, cos, sin, rotary_mode="interleave", partial_slice=[0, part.shape[-1]]
    )
    return part


def _stock(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned: torch.Tensor = torch_npu().npu_rotary_mul(part, cos, sin, rotary_mode="interleave")
    return turned


@rope.kernel("ascend", provider="_C_ascend", why_not=_why_no_rope)
def inplace_partial_rotary_mul(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Turn a copy of the last channels in place."""
    return _rotate(_in_place, x, cos, sin)


@rope.kernel("ascend", provider="torch_npu", why_not=_why_no_rope)
def npu_rotary_mul(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The stock operator on a slice."""
    return _rotate(_stock, x, cos, sin)


@rope_inverse.kernel("ascend", provider="_C_ascend", why_not=_why_no_rope)
def inverse_partial_rotary_mul(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Turn back: the same operator with -sin."""
    return _rotate(_in_place, x, cos, -sin)


@rope_inverse.kernel("ascend", provider="torch_npu", why_not=_why_no_rope)
def inverse_npu_rotary_mul(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn back with the stock operator."""
    return _rotate(_stock, x, cos, -sin)
