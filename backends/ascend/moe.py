"""Moving rows to their experts and back with the stock routing operators.

Between ranks they go by the fused operators of `mc2`, tried first; then by all-to-all; and
between few ranks tokens are gathered here.
"""

from __future__ import annotations

import torch

from v4_ascend.backends import exchange
from v4_ascend.backends.ascend.custom_ops import torch_npu
from v4_ascend.backends.ascend.soc import A5, current_chip
from v4_ascend.ops import (
    Group,
    fp8_round_trip,
    moe_combine,
    moe_dispatch,
    moe_permute,
    moe_unpermute,
)
from v4_ascend.ops.moe import DISPATCH_GROUP

COUNTS, SOURCE_OF_ROW = 1, 1  # expert_tokens_num_type, row_idx_type
MAX_TOPK = 512


def _sorted_rows(
    x: torch.Tensor, ids: torch.Tensor, n_experts: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of experts [first, last), rows per expert, and the pair each row came from."""
    rows, source, sizes, _ = torch_npu().npu_moe_init_routing_v2(
        x.contiguous(),
        ids.int(),
        active_num=ids.numel(),
        expert_num=n_experts,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[first, last],
        row_idx_type=SOURCE_OF_ROW,
    )
    return rows, sizes, source.long()


def _none(x: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    zero = torch.zeros(n_experts, dtype=torch.int64, device=x.device)
    return x[:0], zero, zero[:0]


@moe_permute.kernel("ascend", provider="torch_npu")
def init_routing(
    x: torch.Tensor, ids: torch.Tensor, n_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by expert in one call."""
    return _sorted_rows(x, ids, n_experts, 0, n_experts) if len(x) else _none(x, n_experts)


def _why_no_gather(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> str | None:
    if fp8 and (chip := current_chip()) != A5:
        return f"{chip} has no fp8, and no weights that want such rows"
    many = group.size > exchange.FEW_RANKS
    return f"{group.size} ranks: all-to-all moves less" if many else None


@moe_dispatch.kernel("ascend", provider="torch_npu", why_not=_why_no_gather)
def gather_and_route(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather every rank's tokens and sort those of this rank's experts."""
    if n_experts % group.size:
        raise ValueError(f"ep_size ({group.size}) must divide n_routed_experts ({n_experts})")
    parts = list(group.all_gather(fp8_round_trip(x, DISPATCH_GROUP, 0) if fp8 else x))
    everyone, all_ids = torch.cat(parts), torch.cat(list(group.all_gather(ids)))
    row_weights = torch.cat(list(group.all_gather(weights))).flatten()
    local = n_experts // group.size
    tokens_per_rank = torch.tensor([len(part) for part in parts])
    if not len(everyone):
        rows, sizes, source = _none(x, local)
        return rows, row_weights, sizes, source, tokens_per_rank
    first = group.rank * local
    rows, sizes, source = _sorted_rows(everyone, all_ids, n_experts, first, first + local)
    if group.size > 1:  # how many rows there are is known on the device only
        n_rows = int(sizes.sum())
        rows, source = rows[:n_rows], source[:n_rows]
    return rows, row_weights[source], sizes, source, tokens_per_rank


def _summed(rows: torch.Tensor, source: torch.Tensor, topk: int) -> torch.Tensor:
    """Sum each token's rows in fp32."""
    at = torch.empty_like(source, dtype=torch.int32)
    at[source] = torch.arange(len(source), dtype=torch.int32, device=source.device)
    ones = torch.ones(len(source) // topk, topk, device=rows.device)
    total: torch.Tensor = torch_npu().npu_moe_token_unpermute(rows.float(), at, ones)
    return total


def _why_no_sum(rows: torch.Tensor, topk: int) -> str | None:
    return f"topk is {topk}, must be at most {MAX_TOPK}" if topk > MAX_TOPK else None


def _why_no_unpermute(rows: torch.Tensor, source: torch.Tensor, topk: int) -> str | None:
    return _why_no_sum(rows, topk)


@moe_unpermute.kernel("ascend", provider="torch_npu", why_not=_why_no_unpermute)
def token_unpermute(rows: torch.Tensor, source: torch.Tensor, topk: int) -> torch.Tensor:
    """Sum in one call, from fp32 copies: the result has the dtype of the rows."""
    return _summed(rows, source, topk) if len(rows) else rows.float()


def _why_no_combine(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> str | None:
    if group.size > 1:
        return f"{group.size} ranks, it sums the rows of one"
    return _why_no_sum(rows, topk)


@moe_combine.kernel("ascend", provider="torch_npu", why_not=_why_no_combine)
def local_unpermute(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> torch.Tensor:
    """Sum where all experts are on one rank."""
    return _summed(rows, source, topk) if len(rows) else rows.float()


exchange.register("ascend")
