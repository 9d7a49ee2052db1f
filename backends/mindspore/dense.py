"""Operators whose tensors go to MindSpore as they are."""

from __future__ import annotations

import torch

from v4_ascend.backends.mindspore.exchange import run
from v4_ascend.ops import (
    act_quant,
    hash_gate,
    hc_head,
    hc_post,
    hc_pre,
    head_rms_norm,
    index_topk,
    rms_norm,
    rope,
    rope_inverse,
    swiglu,
    swiglu_act_quant,
    topk_gate,
)
from v4_ascend.ops.formats import E8M0, FP8
from v4_ascend.ops.gemm import ACT_GROUP


@rms_norm.kernel("mindspore", provider="mindspore")
def ms_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm from basic operators."""
    return run("norm_rope.rms_norm", x, weight, eps) if x.numel() else torch.empty_like(x)


@head_rms_norm.kernel("mindspore", provider="mindspore")
def ms_head_rms_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """Unweighted norm of heads, fp32 inside."""
    return run("norm_rope.head_rms_norm", q, eps) if q.numel() else torch.empty_like(q)


@rope.kernel("mindspore", provider="mindspore")
def ms_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Interleaved pairs of the last dims."""
    return run("norm_rope.rope", x, cos, sin, 1.0) if x.numel() else torch.empty_like(x)


@rope_inverse.kernel("mindspore", provider="mindspore")
def ms_rope_inverse(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn back."""
    return run("norm_rope.rope", x, cos, sin, -1.0) if x.numel() else torch.empty_like(x)


def _why_no_groups(x: torch.Tensor, group_size: int) -> str | None:
    if x.shape[-1] % group_size:
        return f"rows of {x.shape[-1]} are no multiple of group_size {group_size}"
    return None


@act_quant.kernel("mindspore", provider="mindspore", why_not=_why_no_groups)
def ms_act_quant(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 bytes by exact arithmetic."""
    if not x.numel():
        scales = x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.uint8)
        return x.to(FP8), scales.view(E8M0)
    values, scales = run("quant.act_quant", x, torch.signbit(x), group_size)
    return values.view(FP8), scales.view(E8M0)


@hc_pre.kernel("mindspore", provider="mindspore")
def ms_hc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixing and Sinkhorn."""
    if not len(x):
        hc = x.shape[1]
        return x[:, 0], fn.new_empty(0, hc), fn.new_empty(0, hc, hc)
    y, post, comb = run(
        "hyper_connection.hc_pre", x, fn, scale, base, norm_eps, hc_eps, sinkhorn_iters
    )
    return y, post, comb


@hc_post.kernel("mindspore", provider="mindspore")
def ms_hc_post(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """Streams after a sublayer."""
    if not len(x):
        return torch.empty_like(residual)
    return run("hyper_connection.hc_post", x, residual, post, comb)


@hc_head.kernel("mindspore", provider="mindspore")
def ms_hc_head(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """Streams to one."""
    return (
        run("hyper_connection.hc_head", x, fn, scale, base, norm_eps, hc_eps) if len(x) else x[:, 0]
    )


@topk_gate.kernel("mindspore", provider="mindspore")
def ms_topk_gate(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Learned routing; ties to the lower id."""
    if not len(logits):
        return logits[:, :topk], logits.new_empty((0, topk), dtype=torch.int64)
    weights, ids = run("choice.topk_gate", logits, bias, topk, route_scale)
    return weights, ids


def _why_no_hash(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> str | None:
    return None if tid2eid.dtype == torch.int64 else f"tid2eid must be int64, got {tid2eid.dtype}"


@hash_gate.kernel("mindspore", provider="mindspore", why_not=_why_no_hash)
def ms_hash_gate(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hashed routing."""
    if not len(logits):
        return logits[:, : tid2eid.shape[1]], tid2eid[:0]
    weights, ids = run("choice.hash_gate", logits, tid2eid, input_ids, route_scale)
    return weights, ids


@swiglu.kernel("mindspore", provider="mindspore")
def ms_swiglu(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> torch.Tensor:
    """Clamped activation."""
    if not len(x):
        return x[:, : x.shape[1] // 2]
    return run("choice.swiglu", x, limit, weight)


def _why_no_halves(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> str | None:
    return _why_no_groups(x, 2 * ACT_GROUP)


@swiglu_act_quant.kernel("mindspore", provider="mindspore", why_not=_why_no_halves)
def ms_swiglu_act_quant(
    x: torch.Tensor, limit: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, one after the other."""
    return ms_act_quant(ms_swiglu(x, limit, weight), ACT_GROUP)


@index_topk.kernel("mindspore", provider="mindspore")
def ms_index_topk(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Highest scores; ties to the lower row."""
    topk = min(topk, scores.shape[1])
    if not topk or not len(scores):
        return torch.empty(len(scores), topk, dtype=torch.int32)
    return run("choice.index_topk", scores, topk)
