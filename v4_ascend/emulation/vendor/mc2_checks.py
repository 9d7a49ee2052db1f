"""What dispatch and combine by HCCL refuse, before anything is sent.

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
from v4_ascend.emulation.stand_in import running_on
from v4_ascend.emulation.vendor.norm import HALVES

ALGORITHMS = {"a2": ("fullmesh",), "a3": ("", "fullmesh_v1", "fullmesh_v2"), "950": ()}
ALGORITHMS["950"] = ALGORITHMS["a3"]
A2_RANKS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)
MOST_RANKS = {"a3": 768, "950": 1024}
DEFAULT_BUFFSIZE = 200  # MB


@dataclass(frozen=True)
class Call:
    """One call's place among the ranks, checked."""

    group: dist.ProcessGroup
    size: int
    rank: int
    n_local: int
    tokens: int  # of this rank
    most: int  # of any rank
    capacity: int  # rows the output has room for


def checked(
    check: Checks, rows: torch.Tensor, expert_ids: torch.Tensor, named: dict[str, Any]
) -> Call:
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
        check.need(
            h % 32 == 0 and 0 < h <= 7168, "H", h, "it must be a multiple of 32, at most 7168"
        )
    else:
        most_ranks = MOST_RANKS[chip.generation]
        check.need(
            2 <= ranks <= most_ranks, "ep_world_size", ranks, f"it must be 2 to {most_ranks}"
        )
        check.need(1024 <= h <= 8192, "H", h, "it must be 1024 to 8192")
    most_tokens = 256 if chip.generation == "a2" or algorithm == "fullmesh_v2" else 512
    check.need(0 < n <= most_tokens, "BS", n, f"it must be 1 to {most_tokens}")
    most_k = 12 if algorithm == "fullmesh_v2" else 16
    check.need(0 < k <= min(most_k, experts), "K", k, f"it must be 1 to {min(most_k, experts)}")
    check.need(0 < experts <= 1024, "moe_expert_num", experts, "it must be 1 to 1024")
    check.need(
        experts % ranks == 0,
        "moe_expert_num",
        experts,
        f"it must be a multiple of the {ranks} ranks",
    )
    _check_ids(check, expert_ids, experts)
    given = named["global_bs"]
    whole = given >= n * ranks and given % ranks == 0
    check.need(given == 0 or whole, "global_bs", given, f"0 or a multiple of {ranks} from {n} each")
    most, local = (given or n * ranks) // ranks, experts // ranks
    _check_mask(check, named["x_active_mask"], n, most)
    _check_buffer(check, most, ranks, local, k, h)
    group = communicator(named["group_ep"])
    check.need(
        group is not None, "group_ep", repr(named["group_ep"]), "it must name an HCCL communicator"
    )
    if group is None:
        raise AssertionError("refused above")
    check.need(group.size() == ranks, "ep_world_size", ranks, f"group_ep has {group.size()}")
    rank = named["ep_rank_id"]
    check.need(group.rank() == rank, "ep_rank_id", rank, f"this is rank {group.rank()} of group_ep")
    _check_alike(check, group, {"moe_expert_num": experts, "global_bs": given, "BS": n})
    return Call(group, ranks, rank, local, n, most, most * ranks * min(local, k))


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
        check.need(alike, name, seen, "it must be the same on every rank of group_ep")


def check_scales(check: Checks, scales: torch.Tensor | None, expert_ids: torch.Tensor) -> None:
    """A2 must have the weights along, A3 cannot, the 950 may."""
    chip = running_on().generation
    check.need(chip != "a2" or scales is not None, "expert_scales", None, "A2 must have it")
    check.need(chip != "a3" or scales is None, "expert_scales", "given", "None but for hierarchy")
    check.dtype(torch.float32, expert_scales=scales)
    check.shape(*expert_ids.shape, expert_scales=scales)
