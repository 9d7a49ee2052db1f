"""Dispatch and combine in one vendor call each (MC2): a step of decoding has few tokens a rank.

The choice must be the same on all ranks, or they wait for each other for ever. So `why_not`
looks at what they have in common only; how many tokens each has is exchanged first, with their
choices, and too many for the operator go by all-to-all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch.nn import functional as F

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend import mc2_limits
from v4_ascend.backends.ascend.custom_ops import torch_npu
from v4_ascend.backends.ascend.soc import A5, current_chip
from v4_ascend.backends.exchange import exchange_tokens
from v4_ascend.errors import BackendUnavailableError
from v4_ascend.ops import Group, fp8_round_trip, moe_combine, moe_dispatch
from v4_ascend.ops.moe import DISPATCH_GROUP

log = logging.getLogger(__name__)
_proven: WeakSet[Any] = WeakSet()  # groups whose rows were seen to arrive in our order
_told: set[int] = set()  # sizes of the groups of which the log says that they went another way


@dataclass(frozen=True, slots=True)
class _Dispatched:
    """What a combine is given of its dispatch; nobody may look into the last three."""

    call: dict[str, Any]  # what both calls have in common
    ids: torch.Tensor
    n_rows: int  # of the buffer, most of them unused
    info: torch.Tensor
    counts: torch.Tensor
    scales: torch.Tensor


def _why_no_dispatch(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> str | None:
    if fp8 and (chip := current_chip()) != A5:
        return f"{chip} has no fp8, and no weights that want such rows"
    why = mc2_limits.why_no_call(
        current_chip(), x.dtype, x.shape[1], ids.shape[1], n_experts, group
    )
    return why or _why_no_chip()


@cache
def _why_no_chip() -> str | None:
    name: str = torch_npu().npu.get_device_name(0)
    return f"{name}: of the 950, only the DT is listed (OT)" if "950PR" in name else None


@moe_dispatch.kernel("ascend", provider="torch_npu", why_not=_why_no_dispatch)
def distribute_dispatch(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send rows by the vendor's operator, choices and weights by an all-gather.

    The operator moves rows and nothing else, and its outputs that say where they came from are
    not to be read. Everybody's choices tell the same, as its rows are in our order: by expert,
    rank, token (OT design document 2.4; proven at a group's first call).
    """
    topk, local = ids.shape[1], n_experts // group.size
    header = torch.cat((ids.int(), weights.view(torch.int32)), dim=1)
    headers = list(group.all_gather(header))
    counts = [len(h) for h in headers]
    most = max(counts)
    why = mc2_limits.why_no_batch(current_chip(), most, x.shape[1], topk, local, group.size)
    if why is not None:
        if most and group.size not in _told:
            _told.add(group.size)
            log.info("moe_dispatch over %d ranks: all-to-all, first because %s", group.size, why)
        return exchange_tokens(x, ids, weights, n_experts, group, fp8)
    everyone = torch.cat(headers)
    flat = everyone[:, :topk].long().flatten() - group.rank * local
    mine = ((flat >= 0) & (flat < local)).nonzero().flatten()
    source = mine[flat[mine].sort(stable=True).indices]
    row_weights = everyone[:, topk:].contiguous().view(torch.float32).flatten()[source]
    tokens_per_rank = torch.tensor(counts)
    if group not in _proven:
        _prove_order(x, ids, source, tokens_per_rank, n_experts, group)
    # The operator's own quantised modes have other scales; rounded rows travel as they are.
    x = fp8_round_trip(x, DISPATCH_GROUP, 0) if fp8 else x
    rows, sizes, dispatched = _dispatch(x, ids, tokens_per_rank, n_experts, group)
    prepared.keep(source, "mc2", dispatched)
    return rows[: len(source)], row_weights, sizes, source, tokens_per_rank


def _dispatch(
    x: torch.Tensor, ids: torch.Tensor, tokens_per_rank: torch.Tensor, n_experts: int, group: Group
) -> tuple[torch.Tensor, torch.Tensor, _Dispatched]:
    """Bring all ranks to the same number of tokens, and send those that are real."""
    n, topk = ids.shape
    most = int(tokens_per_rank.max())
    limits = mc2_limits.LIMITS[current_chip()]
    padding = torch.arange(topk, dtype=torch.int32, device=x.device)  # a row's experts differ
    padded_ids = torch.cat((ids.int(), padding.expand(most - n, topk)))
    mask = None
    if int(tokens_per_rank.min()) < most:
        mask = torch.arange(most, device=x.device) < n
    call: dict[str, Any] = {
        "group_ep": group.hccl_name,
        "ep_world_size": group.size,
        "ep_rank_id": group.rank,
        "moe_expert_num": n_experts,
        "x_active_mask": mask,
        "global_bs": most * group.size,
        "comm_alg": limits.comm_alg,
    }
    # Experts weigh their rows before their last product: here every choice counts once.
    ones = torch.ones(most, topk, device=x.device) if limits.takes_scales else None
    with group.noted("npu_moe_distribute_dispatch_v2", x):
        rows, _, info, sizes, counts, _, scales = torch_npu().npu_moe_distribute_dispatch_v2(
            F.pad(x, (0, 0, 0, most - n)), padded_ids, expert_scales=ones, **call
        )
    return rows, sizes, _Dispatched(call, padded_ids, len(rows), info, counts, scales)


def _combine(rows: torch.Tensor, sent: _Dispatched, group: Group) -> torch.Tensor:
    """Sum every token's rows where it came from, in fp32, rounded to the rows' dtype."""
    takes_scales = mc2_limits.LIMITS[current_chip()].takes_scales
    with group.noted("npu_moe_distribute_combine_v2", rows):
        summed: torch.Tensor = torch_npu().npu_moe_distribute_combine_v2(
            F.pad(rows, (0, 0, 0, sent.n_rows - len(rows))),
            sent.ids,
            sent.info,
            sent.counts,
            torch.ones(sent.ids.shape, device=rows.device),
            expand_scales=sent.scales if takes_scales else None,
            **sent.call,
        )
    return summed


def _prove_order(
    x: torch.Tensor,
    ids: torch.Tensor,
    source: torch.Tensor,
    tokens_per_rank: torch.Tensor,
    n_experts: int,
    group: Group,
) -> None:
    """Send rows that say where they come from; in bf16 every number up to 256 is itself."""
    token = torch.arange(len(x), device=x.device)
    names = torch.stack((token // 256, token % 256, token * 0 + group.rank // 256))
    tags = torch.zeros_like(x)
    tags[:, :3] = names.T.to(x.dtype)
    tags[:, 3] = group.rank % 256
    rows, _, sent = _dispatch(tags, ids, tokens_per_rank, n_experts, group)
    got = rows[: len(source), :4].long()
    pair_token = source // ids.shape[1]
    ends = tokens_per_rank.cumsum(0).to(x.device)
    rank = torch.bucketize(pair_token, ends, right=True)
    at = pair_token - (ends - tokens_per_rank.to(x.device))[rank]
    want = torch.stack((at // 256, at % 256, rank // 256, rank % 256), dim=1)
    # Never a dispatch without its combine.
    back = _combine(rows[: len(source)], sent, group)[: len(x)]
    summed = (tags.float() * ids.shape[1]).to(x.dtype)
    if not torch.equal(got, want) or not torch.equal(back, summed):
        raise BackendUnavailableError(
            f"npu_moe_distribute_dispatch_v2: rank {group.rank} of {group.size}: rows do not "
            "arrive by expert, rank and token, or do not come back (runtime.kernels: reference)"
        )
    _proven.add(group)


def _why_no_combine(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> str | None:
    if not prepared.has(source, "mc2"):
        return "the rows did not come by npu_moe_distribute_dispatch_v2"
    if rows.dtype not in mc2_limits.DTYPES:
        return f"rows are {str(rows.dtype)[6:]}, must be bf16 or fp16 (OPD)"
    return None


@moe_combine.kernel("ascend", provider="torch_npu", why_not=_why_no_combine)
def distribute_combine(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> torch.Tensor:
    """Take rows back the way they came."""
    sent: _Dispatched = prepared.get(source, "mc2")
    return _combine(rows, sent, group)[: int(tokens_per_rank[group.rank])].float()
