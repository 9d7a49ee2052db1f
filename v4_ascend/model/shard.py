"""The part of the network one rank runs, and the groups that join it to the rest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.ops import Group, Solo


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Layers and experts of a rank; weights are read as parts already.

    `layers` is half-open. `placement` has, for each of these layers, the experts of each rank of
    the EP group by slot. Tokens are split over `cp`; heads, groups and vocabulary over `tp`, or,
    with `dsa_cp`, the tokens of sparse attention.
    """

    layers: tuple[int, int]
    placement: Sequence[Sequence[tuple[int, ...]]]
    tp: Group
    cp: Group
    ep: Group
    dsa_cp: bool = False

    @classmethod
    def whole(cls, config: ModelConfig) -> Shard:
        """Return the whole network on one rank."""
        everything = (tuple(range(config.n_routed_experts)),)
        n = config.n_layers
        placement = (everything,) * (n + config.n_draft_layers)
        return cls(layers=(0, n), placement=placement, tp=Solo(), cp=Solo(), ep=Solo())

    def placed(self, layer: int) -> Sequence[tuple[int, ...]]:
        """Return the experts of each rank of the EP group in a layer."""
        return self.placement[layer - self.layers[0]]


@dataclass(frozen=True)
class Slots:
    """Where the experts of a layer are; a copy is chosen by the token's number.

    Shapes:
        slot    [n_experts, most_copies]  int64: slot numbers over the EP group, padded
        copies  [n_experts]  int64
    """

    slot: torch.Tensor
    copies: torch.Tensor

    @classmethod
    def of(cls, placed: Sequence[tuple[int, ...]], device: torch.device) -> Slots | None:
        """Return the table, or None where slot numbers are the experts' own.

        Raises:
            ValueError: an expert is nowhere.
        """
        flat = [e for experts in placed for e in experts]
        if flat == list(range(len(flat))):
            return None
        n = max(flat) + 1
        where: list[list[int]] = [[] for _ in range(n)]
        for slot, expert in enumerate(flat):
            where[expert].append(slot)
        if empty := [e for e, slots in enumerate(where) if not slots]:
            raise ValueError(f"expert {empty[0]} is on no rank")
        most = max(map(len, where))
        padded = [slots + slots[:1] * (most - len(slots)) for slots in where]
        return cls(
            torch.tensor(padded, device=device),
            torch.tensor([len(slots) for slots in where], device=device),
        )

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Turn expert ids [n_tokens, topk] into slot numbers."""
        token = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        return self.slot[ids, token % self.copies[ids]]


def shares(n: int, size: int) -> list[int]:
    """Split `n` tokens over `size` ranks as evenly as can be, the first ones one more."""
    return [n // size + (i < n % size) for i in range(size)]


def span_of(n: int, group: Group) -> tuple[int, int]:
    """Return first and end of a rank's share."""
    sizes = shares(n, group.size)
    first = sum(sizes[: group.rank])
    return first, first + sizes[group.rank]


def gathered(x: torch.Tensor, n: int, group: Group) -> torch.Tensor:
    """Join the shares [.., ...] of `n` tokens."""
    if group.size == 1:
        return x
    return torch.cat(list(group.all_gather(x, shares(n, group.size))))


def rows_of(x: torch.Tensor, rows: Sequence[int], n: int, group: Group) -> torch.Tensor:
    """Return rows [len(rows), ...], in ascending order, of `n` tokens that are split in shares."""
    ends = list(accumulate(shares(n, group.size)))
    cuts = [0, *(bisect_left(rows, end) for end in ends)]
    first = ends[group.rank] - len(x)
    mine = [row - first for row in rows[cuts[group.rank] : cuts[group.rank + 1]]]
    x = x[torch.tensor(mine, dtype=torch.int64, device=x.device)]
    if group.size == 1:
        return x
    return torch.cat(list(group.all_gather(x, [b - a for a, b in pairwise(cuts)])))


def to_tokens(x: torch.Tensor, group: Group) -> torch.Tensor:
    """From all tokens with a share of the heads to a share of the tokens with all heads.

    Shapes: x [n_tokens, n_heads / size, ...], return [share, n_heads, ...]
    """
    sizes = shares(len(x), group.size)
    mine = sizes[group.rank]
    return torch.cat(list(group.all_to_all(x.split(sizes), [mine] * group.size)), 0).unflatten(
        0, (group.size, mine)
    ).transpose(0, 1).flatten(1, 2)  # fmt: skip


def to_heads(x: torch.Tensor, n: int, group: Group) -> torch.Tensor:
    """Back from a share of `n` tokens with all heads to all tokens with a share of the heads."""
    parts = [p.contiguous() for p in x.chunk(group.size, dim=1)]
    return torch.cat(list(group.all_to_all(parts, shares(n, group.size))))
