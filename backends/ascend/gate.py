"""Routing: one vendor operator, learned and hashed; stock only on 950."""

from __future__ import annotations

from typing import Any

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.custom_ops import c_ascend, torch_npu
from v4_ascend.ops import hash_gate, topk_gate
from v4_ascend.ops.gate import WEIGHT_SUM_FLOOR

MAX_TOPK, MAX_EXPERTS = 64, 2048
SQRT_SOFTPLUS = 2
MODE = {
    "k_group": 1,
    "group_count": 1,
    "group_select_mode": 1,
    "renorm": 0,  # a softmax's; weights of this norm_type are normalised anyway
    "norm_type": SQRT_SOFTPLUS,
    "out_flag": False,
    "eps": WEIGHT_SUM_FLOOR,
}
INT32 = "int32"


@hash_gate.preparation("ascend")
def keep_int32(tid2eid: torch.Tensor) -> None:
    """Keep the table as the operator wants it."""
    prepared.keep(tid2eid, INT32, tid2eid.int().contiguous())


def _why_not(logits: torch.Tensor, topk: int) -> str | None:
    if logits.dtype != torch.float32:
        return f"logits are {logits.dtype}, must be fp32"
    if not 1 <= topk <= MAX_TOPK or logits.shape[1] > MAX_EXPERTS:
        return f"{topk} of {logits.shape[1]} experts, must be at most {MAX_TOPK} of {MAX_EXPERTS}"
    return None


def _route(
    call: Any, logits: torch.Tensor, topk: int, route_scale: float, **choice: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if not len(logits):
        ids = torch.empty(0, topk, dtype=torch.int64, device=logits.device)
        return logits.new_empty(0, topk), ids
    weights, ids, _ = call(
        logits.contiguous(), topk, routed_scaling_factor=route_scale, **choice, **MODE
    )
    return weights, ids.long()


def _why_no_topk(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, route_scale: float
) -> str | None:
    return _why_not(logits, topk)


@topk_gate.kernel("ascend", provider="_C_ascend", why_not=_why_no_topk)
def gating_top_k_hash(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """vllm-ascend's operator without a table."""
    return _route(c_ascend("moe_gating_top_k_hash"), logits, topk, route_scale, bias=bias)


@topk_gate.kernel("ascend", provider="torch_npu", why_not=_why_no_topk)
def gating_top_k(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock operator; its sqrt(softplus) is for 950."""
    return _route(torch_npu().npu_moe_gating_top_k, logits, topk, route_scale, bias=bias)


def _why_no_hash(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> str | None:
    if not prepared.has(tid2eid, INT32):
        return "tid2eid was not prepared"
    return _why_not(logits, tid2eid.shape[1])


def _hashed(
    call: Any,
    logits: torch.Tensor,
    tid2eid: torch.Tensor,
    input_ids: torch.Tensor,
    route_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    table = prepared.get(tid2eid, INT32)
    ids = input_ids.long()
    return _route(call, logits, table.shape[1], route_scale, input_ids=ids, tid2eid=table)


@hash_gate.kernel("ascend", provider="_C_ascend", why_not=_why_no_hash)
def gating_hash(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """vllm-ascend's operator with the table."""
    return _hashed(c_ascend("moe_gating_top_k_hash"), logits, tid2eid, input_ids, route_scale)


@hash_gate.kernel("ascend", provider="torch_npu", why_not=_why_no_hash)
def stock_gating_hash(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock operator with the table, for 950."""
    return _hashed(torch_npu().npu_moe_gating_top_k, logits, tid2eid, input_ids, route_scale)
