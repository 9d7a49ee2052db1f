"""Rows to the ranks of their experts and back, by the name of an HCCL communicator.

Really exchanged, over the gloo group that carries the communicator. What the vendor calls
opaque is filled so that a combine knows whether it got what its dispatch returned.

Sources: op-plugin npu_moe_distribute_dispatch_v2.md and _combine_v2.md (OPD), for the 950
ops-transformer aclnnMoeDistributeDispatchV4.md (OT).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.collectives import communicator
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor.norm import HALVES

INFO = 128  # int32 of a row in assist_info_for_combine
COOKIE = 0x4D4332  # marks a row's info, so that another tensor in its place is noticed
ALGORITHMS = {"a2": ("fullmesh",), "a3": ("", "fullmesh_v1", "fullmesh_v2"), "950": ()}
ALGORITHMS["950"] = ALGORITHMS["a3"]
A2_RANKS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)
MOST_RANKS = {"a3": 768, "950": 1024}
DEFAULT_BUFFSIZE = 200  # MB


@dataclass(frozen=True)
class _Call:
    """One call's place among the ranks, checked."""

    group: dist.ProcessGroup
    size: int
    rank: int
    n_local: int
    tokens: int  # of this rank
    most: int  # of any rank
    capacity: int  # rows the output has room for


def _checked(
    check: Checks, rows: torch.Tensor, expert_ids: torch.Tensor, named: dict[str, Any]
) -> _Call:
    """Refuse what both operators refuse; `named` are their arguments by name."""
    chip = running_on()
    check.need(chip.name != "950pr", "the chip", chip.soc_name, "OT lists Ascend 950DT only")
    check.dtype(*HALVES, x=rows)
    check.dtype(torch.int32, expert_ids=expert_ids)
    check.shape(None, None, x=rows, expert_ids=expert_ids)
    _check_unused(check, named)
    (n, k), h = expert_ids.shape, rows.shape[1]
    ranks, experts = named["ep_world_size"], named["moe_expert_num"]
    algorithm = named["comm_alg"]
    check.one_of(ALGORITHMS[chip.generation], comm_alg=algorithm)
    if chip.generation == "a2":
        check.one_of(A2_RANKS, ep_world_size=ranks)
        check.need(h % 32 == 0 and 0 < h <= 7168, "H", h, "a multiple of 32, at most 7168")
    else:
        most_ranks = MOST_RANKS[chip.generation]
        check.need(2 <= ranks <= most_ranks, "ep_world_size", ranks, f"2 to {most_ranks}")
        check.need(1024 <= h <= 8192, "H", h, "1024 to 8192")
    most_tokens = 256 if chip.generation == "a2" or algorithm == "fullmesh_v2" else 512
    check.need(0 < n <= most_tokens, "BS", n, f"1 to {most_tokens}")
    most_k = 12 if algorithm == "fullmesh_v2" else 16
    check.need(0 < k <= min(most_k, experts), "K", k, f"1 to {min(most_k, experts)}")
    check.need(0 < experts <= 1024, "moe_expert_num", experts, "1 to 1024")
    check.need(experts % ranks == 0, "moe_expert_num", experts, f"a multiple of {ranks} ranks")
    _check_ids(check, expert_ids, experts)
    given = named["global_bs"]
    whole = given >= n * ranks and given % ranks == 0
    check.need(given == 0 or whole, "global_bs", given, f"0 or a multiple of {ranks} from {n} each")
    most, local = (given or n * ranks) // ranks, experts // ranks
    _check_mask(check, named["x_active_mask"], n, most)
    _check_buffer(check, most, ranks, local, k, h)
    group = communicator(named["group_ep"])
    check.need(group is not None, "group_ep", repr(named["group_ep"]), "an HCCL communicator")
    if group is None:
        raise AssertionError("refused above")
    check.need(group.size() == ranks, "ep_world_size", ranks, f"group_ep has {group.size()}")
    rank = named["ep_rank_id"]
    check.need(group.rank() == rank, "ep_rank_id", rank, f"this is rank {group.rank()} of group_ep")
    _check_alike(check, group, {"moe_expert_num": experts, "global_bs": given, "BS": n})
    return _Call(group, ranks, rank, local, n, most, most * ranks * min(local, k))


def _check_unused(check: Checks, named: dict[str, Any]) -> None:
    """Refuse arguments that no released version takes, and those not emulated."""
    none = ("elastic_info", "scales", "performance_info", "shared_expert_x", "ori_x", "y_dtype")
    for name in (*none, "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
        check.need(named.get(name) is None, name, "given", "not taken, or not emulated")
    check.one_of(("",), group_tp=named["group_tp"])
    check.one_of(
        (0,) if running_on().generation == "a2" else (0, 1), tp_world_size=named["tp_world_size"]
    )
    check.one_of((0, 1), shared_expert_num=named["shared_expert_num"])
    for name in ("tp_rank_id", "expert_shard_type", "shared_expert_rank_num", "zero_expert_num"):
        check.one_of((0,), **{name: named[name]})
    for name in ("copy_expert_num", "const_expert_num", "quant_mode", "comm_quant_mode"):
        check.one_of((0,), **{name: named.get(name, 0)})


def _check_ids(check: Checks, expert_ids: torch.Tensor, experts: int) -> None:
    inside = bool(((expert_ids >= 0) & (expert_ids < experts)).all())
    check.need(inside, "expert_ids", "outside", f"0 to {experts - 1}")
    ordered = expert_ids.sort(-1).values
    distinct = bool((ordered[:, 1:] != ordered[:, :-1]).all())
    check.need(distinct, "expert_ids", "twice the same in a row", "a row's experts must differ")


def _check_mask(check: Checks, mask: torch.Tensor | None, n: int, most: int) -> None:
    if mask is None:
        return
    check.dtype(torch.bool, x_active_mask=mask)
    check.shape(n, x_active_mask=mask)
    first = int(mask.sum())
    check.need(bool(mask[:first].all()), "x_active_mask", mask.tolist(), "true first, then false")
    uneven = n != most
    check.need(not uneven or bool(mask.all()), "x_active_mask", "false", "all true where BS differ")


def _check_buffer(check: Checks, most: int, ranks: int, local: int, k: int, h: int) -> None:
    """Refuse what the communicator's buffer does not hold: it would hang, or worse."""
    if running_on().generation == "a2":
        need = 2 * (most * ranks * min(local, k) * h * 2 + 2 * 2**20)
    else:
        row = (-(-2 * h // 32) * 32 + 64 + 511) // 512 * 512
        need = 2 * (local * most * ranks * row + (k + 1) * most * (-(-2 * h // 512) * 512))
    has = int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_BUFFSIZE))
    check.need(need <= has << 20, "HCCL_BUFFSIZE", has, f"at least {-(-need >> 20)} MB")


def _check_alike(check: Checks, group: dist.ProcessGroup, values: dict[str, int]) -> None:
    """Refuse ranks that differ in what must be alike; BS may differ where global_bs says so."""
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, values, group=group)
    for name in values:
        seen = [v[name] for v in everyone]
        alike = len(set(seen)) == 1 or (name == "BS" and values["global_bs"] > 0)
        check.need(alike, name, seen, "the same on every rank of group_ep")


def _exchanged(
    call: _Call, rows: torch.Tensor, leaving: list[int], arriving: list[int]
) -> torch.Tensor:
    got = rows.new_empty(sum(arriving), *rows.shape[1:])
    dist.all_to_all_single(
        got.view(torch.uint8),
        rows.contiguous().view(torch.uint8),
        arriving,
        leaving,
        group=call.group,
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
    call = _checked(check, x, expert_ids, named)
    check.shape(call.tokens, None, x=x)
    check.one_of((0, 1), expert_token_nums_type=expert_token_nums_type)
    _check_scales(check, expert_scales, expert_ids)
    k = expert_ids.shape[1]
    active = call.tokens if x_active_mask is None else int(x_active_mask.sum())
    flat = expert_ids[:active].flatten().long()
    order = flat.sort(stable=True).indices
    sent_counts = torch.bincount(flat, minlength=moe_expert_num).view(call.size, call.n_local)
    got_counts = torch.empty_like(sent_counts)
    dist.all_to_all_single(got_counts, sent_counts, group=call.group)
    leaving, arriving = sent_counts.sum(1).tolist(), got_counts.sum(1).tolist()
    names = torch.stack((order * 0 + COOKIE, order * 0 + call.rank, order // k, order % k), dim=1)
    rows = _exchanged(call, x[order // k], leaving, arriving)
    names = _exchanged(call, names.int(), leaving, arriving)
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
        weights = _exchanged(call, expert_scales.flatten()[order].unsqueeze(1), leaving, arriving)
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


def _check_scales(check: Checks, scales: torch.Tensor | None, expert_ids: torch.Tensor) -> None:
    """A2 must have the weights along, A3 cannot, the 950 may."""
    chip = running_on().generation
    check.need(chip != "a2" or scales is not None, "expert_scales", None, "A2 must have it")
    check.need(chip != "a3" or scales is None, "expert_scales", "given", "None but for hierarchy")
    check.dtype(torch.float32, expert_scales=scales)
    check.shape(*expert_ids.shape, expert_scales=scales)


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
    call = _checked(check, expand_x, expert_ids, named)
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
    back = _exchanged(call, expand_x[:n][order], sent, got)
    at = _exchanged(call, info[:n, 2:4][order], sent, got).long()
    (tokens, k), h = expert_ids.shape, expand_x.shape[1]
    active = tokens if x_active_mask is None else int(x_active_mask.sum())
    whole = len(at) == active * k and bool((at[:, 0] < active).all())
    check.need(whole, "rows that came back", len(at), f"{k} of each of {active} tokens")
    pairs = torch.zeros(tokens, k, h)
    pairs[at[:, 0], at[:, 1]] = back.float()
    out = (pairs * expert_scales.unsqueeze(-1)).sum(1)
    out[active:] = float("nan")
    return out.to(expand_x.dtype)
