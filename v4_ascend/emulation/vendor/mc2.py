"""Rows to the ranks of their experts and back, by the name of an HCCL communicator.

Really exchanged, over the gloo group that carries the communicator. What the vendor calls
opaque is filled so that a combine knows whether it got what its dispatch returned.

Sources: op-plugin npu_moe_distribute_dispatch_v2.md and _combine_v2.md (OPD), for the 950
ops-transformer aclnnMoeDistributeDispatchV4.md (OT).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor.mc2_checks import check_scales, checked

INFO = 128  # int32 of a row in assist_info_for_combine
COOKIE = 0x4D4332  # marks a row's info, so that another tensor in its place is noticed


def exchanged(
    group: dist.ProcessGroup, rows: torch.Tensor, leaving: list[int], arriving: list[int]
) -> torch.Tensor:
    """Send each rank its rows of `rows`, in order, and return what the others sent here."""
    got = rows.new_empty(sum(arriving), *rows.shape[1:])
    dist.all_to_all_single(
        got.view(torch.uint8),
        rows.contiguous().view(torch.uint8),
        arriving,
        leaving,
        group=group,
    )
    return got


@stand_in("npu::npu_moe_distribute_dispatch_v2")
def npu_moe_distribute_dispatch_v2(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
    performance_info: torch.Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: int | None = None,
    x_dtype: int | None = None,
    scales_dtype: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Send each token to each of its experts; rows arrive by expert, then rank, then token.

    Shapes:
        x, expert_ids  [BS, H], [BS, K] int32
        return  rows [A, H], those of nobody NaN; factors, none; info [A 128]; tokens per expert
                [local] int64; counts, int32; [0]; the scales of the rows, [A] where given
    """
    named = dict(locals())
    check = Checks("npu_moe_distribute_dispatch_v2", "OPD and OT moe_distribute_dispatch_v2")
    call = checked(check, x, expert_ids, named)
    check.shape(call.tokens, None, x=x)
    check.one_of((0, 1), expert_token_nums_type=expert_token_nums_type)
    check_scales(check, expert_scales, expert_ids)
    k = expert_ids.shape[1]
    active = call.tokens if x_active_mask is None else int(x_active_mask.sum())
    flat = expert_ids[:active].flatten().long()
    order = flat.sort(stable=True).indices
    sent_counts = torch.bincount(flat, minlength=moe_expert_num).view(call.size, call.n_local)
    got_counts = torch.empty_like(sent_counts)
    dist.all_to_all_single(got_counts, sent_counts, group=call.group)
    leaving, arriving = sent_counts.sum(1).tolist(), got_counts.sum(1).tolist()
    names = torch.stack((order * 0 + COOKIE, order * 0 + call.rank, order // k, order % k), dim=1)
    rows = exchanged(call.group, x[order // k], leaving, arriving)
    names = exchanged(call.group, names.int(), leaving, arriving)
    expert = torch.arange(call.n_local).repeat(call.size).repeat_interleave(got_counts.flatten())
    by_expert = expert.sort(stable=True).indices  # by rank and token within an expert already
    n = len(rows)
    expand_x = torch.full((call.capacity, x.shape[1]), float("nan"), dtype=x.dtype)
    expand_x[:n] = rows[by_expert]
    info = torch.zeros(max(call.capacity, -(-call.tokens * k // INFO)), INFO, dtype=torch.int32)
    info[:n, :4] = names[by_expert]
    tokens = got_counts.sum(0)
    counts = got_counts.T.flatten().cumsum(0).int()
    expand_scales = torch.empty(0)
    if expert_scales is not None:
        weights = exchanged(
            call.group, expert_scales.flatten()[order].unsqueeze(1), leaving, arriving
        )
        expand_scales = torch.full((call.capacity,), float("nan"))
        expand_scales[:n] = weights.flatten()[by_expert]
        if running_on().generation != "950":
            servers = call.size // 8
            more = torch.zeros(2 * call.most * call.size * k * servers, dtype=torch.int32)
            counts = torch.cat((counts, more))
    return (
        expand_x,
        torch.full((call.capacity,), float("nan")),
        info.flatten(),
        tokens if expert_token_nums_type else tokens.cumsum(0),
        counts,
        torch.empty(tp_world_size, dtype=torch.int32),
        expand_scales,
    )


@stand_in("npu::npu_moe_distribute_combine_v2")
def npu_moe_distribute_combine_v2(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
    ori_x: torch.Tensor | None = None,
    const_expert_alpha_1: torch.Tensor | None = None,
    const_expert_alpha_2: torch.Tensor | None = None,
    const_expert_v: torch.Tensor | None = None,
    performance_info: torch.Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> torch.Tensor:
    """Return, per token, its experts' rows times their scales; tokens of nobody are NaN.

    Shapes:
        expand_x  [A, H], as dispatched
        expert_ids, expert_scales  [BS, K] int32, fp32
        return  [BS, H]  as expand_x, summed in fp32
    """
    named = dict(locals())
    check = Checks("npu_moe_distribute_combine_v2", "OPD and OT moe_distribute_combine_v2")
    call = checked(check, expand_x, expert_ids, named)
    check.need(
        len(expand_x) >= call.capacity, "expand_x.shape[0]", len(expand_x), f"A is {call.capacity}"
    )
    check.dtype(torch.float32, expert_scales=expert_scales, expand_scales=expand_scales)
    check.shape(*expert_ids.shape, expert_scales=expert_scales)
    check.dtype(torch.int32, assist_info=assist_info_for_combine, ep_send_counts=ep_send_counts)
    on_a2 = running_on().generation == "a2"
    check.need(not on_a2 or expand_scales is not None, "expand_scales", None, "A2 must have it")
    n_counts = call.size * call.n_local
    check.need(
        len(ep_send_counts) >= n_counts, "ep_send_counts", len(ep_send_counts), f"{n_counts}"
    )
    counts = ep_send_counts[:n_counts].view(call.n_local, call.size)
    n = int(counts[-1, -1])
    info = assist_info_for_combine.view(-1, INFO)
    known = n <= len(info) and bool((info[:n, 0] == COOKIE).all())
    check.need(known, "assist_info_for_combine", "another tensor", "what dispatch returned")
    rank = info[:n, 1].long()
    order = rank.sort(stable=True).indices
    leaving = torch.bincount(rank, minlength=call.size)
    arriving = torch.empty_like(leaving)
    dist.all_to_all_single(arriving, leaving, group=call.group)
    sent, got = leaving.tolist(), arriving.tolist()
    back = exchanged(call.group, expand_x[:n][order], sent, got)
    at = exchanged(call.group, info[:n, 2:4][order], sent, got).long()
    (tokens, k), h = expert_ids.shape, expand_x.shape[1]
    active = tokens if x_active_mask is None else int(x_active_mask.sum())
    whole = len(at) == active * k and bool((at[:, 0] < active).all())
    check.need(whole, "rows that came back", len(at), f"{k} of each of {active} tokens")
    pairs = torch.zeros(tokens, k, h)
    pairs[at[:, 0], at[:, 1]] = back.float()
    out = (pairs * expert_scales.unsqueeze(-1)).sum(1)
    out[active:] = float("nan")
    return out.to(expand_x.dtype)
