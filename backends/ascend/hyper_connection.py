"""Hyper-connections: vllm-ascend's fused operators, and torch_npu's on 950."""

from __future__ import annotations

import torch

from v4_ascend.backends.ascend.custom_ops import c_ascend, torch_npu
from v4_ascend.ops import hc_post, hc_pre
from v4_ascend.ops.hyper_connection import HC_MULT

FUSED_DIMS = (4096, 7168)
DIM_STEP, MAX_DIM, MAX_ITERS = 16, 16384, 100


def _why_no_streams(x: torch.Tensor) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"the streams are {x.dtype}, must be bf16"
    if x.shape[1] != HC_MULT:
        return f"hc_mult is {x.shape[1]}, must be {HC_MULT}"
    return None


def _why_no_mhc(x: torch.Tensor) -> str | None:
    dim = x.shape[-1]
    if dim % DIM_STEP or dim > MAX_DIM:
        return f"dim is {dim}, must be a multiple of {DIM_STEP} up to {MAX_DIM}"
    return _why_no_streams(x)


def _why_no_fused_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> str | None:
    if x.shape[-1] not in FUSED_DIMS:
        return f"dim is {x.shape[-1]}, must be one of {FUSED_DIMS}"
    return _why_no_streams(x)


@hc_pre.kernel("ascend", provider="_C_ascend", why_not=_why_no_fused_pre)
def fused_hc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm, mixing product, Sinkhorn and collapse in one operator."""
    if not len(x):
        return _nothing(x)
    call = c_ascend("npu_hc_pre_v2")
    y, post, comb = call(x.contiguous(), fn, scale, base, HC_MULT, sinkhorn_iters, norm_eps, hc_eps)
    return y, post, comb


def _why_no_mhc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> str | None:
    if not 1 <= sinkhorn_iters <= MAX_ITERS:
        return f"sinkhorn_iters is {sinkhorn_iters}, must be 1 to {MAX_ITERS}"
    return _why_no_mhc(x)


@hc_pre.kernel("ascend", provider="torch_npu", why_not=_why_no_mhc_pre)
def mhc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two stock operators; the mixing product in fp32."""
    if not len(x):
        return _nothing(x)
    npu = torch_npu()
    y, post, comb, *_ = npu.npu_mhc_pre(
        x.contiguous(), fn, scale, base, norm_eps=norm_eps, hc_eps=hc_eps, inner_precise=0
    )
    comb, *_ = npu.npu_mhc_sinkhorn(comb, eps=hc_eps, num_iters=sinkhorn_iters)
    return y, post, comb


def _nothing(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = x.new_empty(0, HC_MULT, HC_MULT, dtype=torch.float32)
    return x[:, 0], wide[:, 0], wide


def _why_no_post(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, must be bf16"
    return _why_no_mhc(residual)


@hc_post.kernel("ascend", provider="_C_ascend", why_not=_why_no_post)
def fused_hc_post(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """vllm-ascend's operator, which wants a batch in front of the tokens."""
    if not len(x):
        return residual.clone()
    batched = (t.unsqueeze(0).contiguous() for t in (x, residual, post, comb))
    out: torch.Tensor = c_ascend("npu_hc_post")(*batched)
    return out.squeeze(0)


@hc_post.kernel("ascend", provider="torch_npu", why_not=_why_no_post)
def mhc_post(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """The stock operator: the streams come first."""
    if not len(x):
        return residual.clone()
    out: torch.Tensor = torch_npu().npu_mhc_post(residual, comb, x, post)
    return out
