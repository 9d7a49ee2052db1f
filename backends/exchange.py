"""Dispatch and combine by all-to-all: a token goes once to each rank that has experts of it.

The all-gather of the references moves every token to every rank; beyond a few ranks most of
that is for nobody. Results are the references' bit for bit: rows arrive in the same order and
are summed in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from v4_ascend.ops import Group, act_quant, moe_combine, moe_dispatch
from v4_ascend.ops.formats import E8M0, FP8, dequantize_groups
from v4_ascend.ops.moe import DISPATCH_GROUP

FEW_RANKS = 3  # up to here, gathering is one exchange instead of three and moves as much


def by_group(
    why_not: Callable[[Group], str | None],
) -> tuple[Callable[..., str | None], Callable[..., str | None]]:
    """Return the refusals of `moe_dispatch` and `moe_combine` that look at the group alone."""

    def dispatch(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        n_experts: int,
        group: Group,
        fp8: bool,
    ) -> str | None:
        return why_not(group)

    def combine(
        rows: torch.Tensor,
        source: torch.Tensor,
        topk: int,
        tokens_per_rank: torch.Tensor,
        group: Group,
    ) -> str | None:
        return why_not(group)

    return dispatch, combine


def _why_not(group: Group) -> str | None:
    return f"{group.size} ranks: gathering is as good" if group.size <= FEW_RANKS else None


def register(backend: str) -> None:
    """Let calls on `backend` try these two before what is registered later."""
    dispatch, combine = by_group(_why_not)
    moe_dispatch.kernel(backend, provider="torch", why_not=dispatch)(exchange_tokens)
    moe_combine.kernel(backend, provider="torch", why_not=combine)(exchange_rows)


def exchange_tokens(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token to the ranks of its experts, with its choices and weights."""
    if n_experts % group.size:
        raise ValueError(f"ep_size ({group.size}) must divide n_routed_experts ({n_experts})")
    (n, topk), local = ids.shape, n_experts // group.size
    goes = torch.zeros(n, group.size, dtype=torch.bool, device=x.device)
    goes.scatter_(1, ids // local, value=True)
    counts = torch.cat((goes.new_full((1,), n, dtype=torch.int64), goes.sum(0)))
    table = torch.stack(list(group.all_gather(counts))).cpu()
    tokens_per_rank, arriving = table[:, 0].clone(), table[:, 1 + group.rank].tolist()
    leaving: list[int] = table[group.rank, 1:].tolist()
    token = goes.T.nonzero()[:, 1]  # by rank, then in order
    choices = torch.cat((token.unsqueeze(1), ids[token]), dim=1).int()
    header = torch.cat((choices, weights[token].view(torch.int32)), dim=1)
    headers = torch.cat(list(group.all_to_all(header.split(leaving), arriving)))
    leave = _packed(x)[token] if fp8 else x[token]
    rows = torch.cat(list(group.all_to_all(leave.split(leaving), arriving)))
    rows = _unpacked(rows, x) if fp8 else rows
    first = tokens_per_rank.cumsum(0) - tokens_per_rank
    of_rank = torch.repeat_interleave(first, torch.tensor(arriving)).to(x.device)
    pair = ((headers[:, 0] + of_rank) * topk).unsqueeze(1) + torch.arange(topk, device=x.device)
    expert = headers[:, 1 : 1 + topk].long() - group.rank * local
    is_mine = ((expert >= 0) & (expert < local)).flatten()
    mine = is_mine.nonzero().flatten()
    flat = expert.flatten()[mine]
    order = flat.sort(stable=True).indices
    taken = mine[order]
    row_weights = headers[:, 1 + topk :].contiguous().view(torch.float32).flatten()[taken]
    sizes = torch.bincount(flat, minlength=local)
    return rows[taken // topk], row_weights, sizes, pair.flatten()[taken], tokens_per_rank


def _packed(x: torch.Tensor) -> torch.Tensor:
    """Round rows [n, dim] to FP8, and put their scales behind them: [n, dim + dim / 128] bytes."""
    values, scales = act_quant(x, DISPATCH_GROUP)
    return torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), dim=1)


def _unpacked(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    values, scales = rows.split((like.shape[1], like.shape[1] // DISPATCH_GROUP), dim=1)
    return dequantize_groups(values.view(FP8), scales.view(E8M0)).to(like.dtype)


def exchange_rows(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> torch.Tensor:
    """Send each row to the rank its token came from, and sum there."""
    ends = tokens_per_rank.cumsum(0).to(source.device)
    owner = torch.bucketize(source // topk, ends, right=True)
    order = owner.sort(stable=True).indices
    counts = torch.bincount(owner, minlength=group.size)
    table = torch.stack(list(group.all_gather(counts))).cpu()
    leaving: list[int] = table[group.rank].tolist()
    arriving: list[int] = table[:, group.rank].tolist()
    n = int(tokens_per_rank[group.rank])
    first = int(tokens_per_rank[: group.rank].sum())
    at = torch.cat(list(group.all_to_all(source[order].split(leaving), arriving)))
    back = torch.cat(list(group.all_to_all(rows[order].split(leaving), arriving)))
    pairs = torch.zeros(n * topk, rows.shape[1], device=rows.device)
    pairs[at - first * topk] = back.float()
    return pairs.unflatten(0, (n, topk)).sum(1)
