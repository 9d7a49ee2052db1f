"""Routing: the choice of experts and their weights.

Sources: vllm-ascend fused_topk_router.py (the call), ops-transformer moe_gating_top_k README.
"""

from __future__ import annotations

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import ALL, running_on, stand_in

SOFTMAX, SIGMOID, SQRT_SOFTPLUS = 0, 1, 2


def _gate(
    check: Checks,
    x: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    tid2eid: torch.Tensor | None,
    k_group: int,
    group_count: int,
    routed_scaling_factor: float,
    eps: float,
    renorm: int,
    norm_type: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check.dtype(torch.float32, torch.bfloat16, torch.float16, x=x)
    check.shape(None, None, x=x)
    tokens, experts = x.shape
    check.need(experts <= 2048, "x's experts", experts, "at most 2048")
    check.need(1 <= k <= min(64, experts), "k", k, f"1 to {min(64, experts)}")
    check.one_of((1,), k_group=k_group, group_count=group_count)
    check.one_of((0,), renorm=renorm)
    check.dtype(torch.float32, x.dtype, bias=bias)
    check.shape(experts, bias=bias)
    logits = x.float()
    if norm_type == SOFTMAX:
        scores = torch.softmax(logits, -1)
    elif norm_type == SIGMOID:
        scores = torch.sigmoid(logits)
    else:
        scores = torch.sqrt(torch.nn.functional.softplus(logits))
    if input_ids is not None:
        check.given(tid2eid=tid2eid)
        assert tid2eid is not None
        check.shape(tokens, input_ids=input_ids)
        check.shape(None, k, tid2eid=tid2eid)
        check.dtype(torch.int64, input_ids=input_ids)
        check.dtype(torch.int32, tid2eid=tid2eid)
        there = bool(((input_ids >= 0) & (input_ids < len(tid2eid))).all())
        check.need(there, "input_ids", "outside the table", f"0 to {len(tid2eid) - 1}")
        chosen = tid2eid[input_ids].long()
    else:
        check.need(tid2eid is None, "tid2eid", "given", "it needs input_ids")
        choice = scores if bias is None else scores + bias.float()
        chosen = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(-1, chosen)
    if norm_type != SOFTMAX:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), chosen.int(), scores


@stand_in("_C_ascend::moe_gating_top_k_hash")
def moe_gating_top_k_hash(
    x: torch.Tensor,
    k: int,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights [T, k] dtype of x, experts [T, k] int32 and all scores [T, E] fp32.

    With input_ids and tid2eid [vocab, k] the table chooses (hash routing), else the k
    highest of score + bias.
    """
    check = Checks("moe_gating_top_k_hash", "vllm-ascend fused_topk_router.py")
    check.one_of((SQRT_SOFTPLUS, SIGMOID, SOFTMAX), norm_type=norm_type)
    check.one_of((0, 1), group_select_mode=group_select_mode)
    return _gate(
        check, x, k, bias, input_ids, tid2eid, k_group, group_count, routed_scaling_factor, eps,
        renorm, norm_type,
    )  # fmt: skip


@stand_in("npu::npu_moe_gating_top_k", ALL)
def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `moe_gating_top_k_hash`; sqrt(softplus) and hash routing are 950 only.

    torch_npu 2.10.0.post4 has no input_ids and tid2eid.
    """
    check = Checks("npu_moe_gating_top_k", "ops-transformer moe/moe_gating_top_k/README.md")
    on_950 = running_on().generation == "950"
    check.one_of((0, 1, 2) if on_950 else (0, 1), norm_type=norm_type)
    check.need(on_950 or input_ids is None, "input_ids", "given", "hash routing is 950 only")
    return _gate(
        check, x, k, bias, input_ids, tid2eid, k_group, group_count, routed_scaling_factor, eps,
        renorm, norm_type,
    )  # fmt: skip
