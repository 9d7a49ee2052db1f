"""Bytes that leave a rank of the native engine in one step, by group.

What gathers, sums and exchanges send is the least that any library can: a gather sends its rows
to every other rank, padded to the longest share; a sum sends twice all of itself but one share; an
exchange sends each part to the rank it is for. `runtime.comm` counts the same of the tensors it
is given, and gloo's sockets carry as much. No drafter's are in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import ParallelConfig

WIDE = 4  # bytes of a logit, a routing weight, a summed row's value: fp32
NUMBER = 8  # of a token's, an expert's or a row's number: int64
NARROW = 4  # of those that travel with a token: int32
FP8_GROUP = 128  # values with one scale of a byte


@dataclass(frozen=True)
class Routing:
    """Where an EP group's tokens go in a layer, from rank a to rank b.

    `tokens[a][b]` have experts there, with `rows[a][b]` choices of them.
    """

    tokens: Sequence[Sequence[float]]
    rows: Sequence[Sequence[float]]

    @classmethod
    def even(cls, sizes: Sequence[int], n_experts: int, topk: int) -> Routing:
        """Say what to expect of `sizes` tokens on each rank, if all experts are as likely."""
        n_ranks = len(sizes)
        elsewhere = n_experts - n_experts // n_ranks
        reached = 1 - comb(elsewhere, topk) / comb(n_experts, topk)
        return cls(
            [[n * reached] * n_ranks for n in sizes],
            [[n * topk / n_ranks] * n_ranks for n in sizes],
        )


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a layout sends.

    `layers` are the stages', `value_bytes` those of a stream's value. `gathers` says whether the
    operators between experts gather every token or send each where it belongs; there `fp8` is
    whether rows travel rounded.
    """

    config: ModelConfig
    parallel: ParallelConfig
    layers: Sequence[tuple[int, int]]
    value_bytes: int
    gathers: bool
    fp8: bool = False

    def forward(
        self, rank: int, n_tokens: Sequence[int], routing: Sequence[Routing] | None = None
    ) -> dict[str, float]:
        """Return what leaves a rank until its streams have, without the output head.

        `n_tokens` are those of each DP group. `routing` is of the rank's layers and EP group, and
        by default as `Routing.even` expects.
        """
        c, p, sent = self.config, self.parallel, defaultdict[str, float](float)
        stage, within = divmod(rank, p.stage_size)
        n = n_tokens[within // (p.cp_size * p.tp_size)]
        own = _share(n, p.cp_size, within // p.tp_size % p.cp_size)
        row = c.dim * self.value_bytes
        if stage < p.pp_size - 1:
            sent["pp"] += boundary_bytes(c, own, self.value_bytes)
        if stage == 0:
            sent["tp"] += _summed(own * row, p.tp_size)  # parts of the vocabulary
        sizes = self._group_tokens(within, n_tokens)
        for layer in range(*self.layers[stage]):
            sent["cp"] += _gathered(-(-n // p.cp_size), row, p.cp_size)
            sent["tp"] += _summed(own * row, p.tp_size)
            sent["tp"] += _gathered(-(-own // p.tp_size), row, p.tp_size)
            if p.dsa_cp:
                sent["tp"] += self._heads_for_tokens(own, within % p.tp_size)
            if p.ep_size > 1 and self.gathers:
                sent["ep"] += self._all_gathered(sizes)
            elif p.ep_size > 1:
                to = routing[layer - self.layers[stage][0]] if routing else self._even(sizes)
                sent["ep"] += self._sent_where_they_belong(to, within % p.ep_size)
        return sent

    def decode(
        self, rank: int, n_tokens: Sequence[int], routing: Sequence[Routing] | None = None
    ) -> dict[str, float]:
        """Return what leaves a rank in a step that draws behind every token."""
        c, p = self.config, self.parallel
        sent = self.forward(rank, n_tokens, routing)
        stage, within = divmod(rank, p.stage_size)
        n, cp = n_tokens[within // (p.cp_size * p.tp_size)], within // p.tp_size % p.cp_size
        if stage == p.pp_size - 1:
            stream = c.hc_mult * c.dim * self.value_bytes
            sent["cp"] += _gathered(-(-n // p.cp_size), stream, p.cp_size)
            if cp == 0:
                sent["tp"] += _gathered(n, c.vocab_size // p.tp_size * WIDE, p.tp_size)
        return sent

    def _group_tokens(self, within: int, n_tokens: Sequence[int]) -> list[int]:
        """Count the tokens that each rank of an EP group brings to it."""
        p, sizes = self.parallel, []
        first = within - within % p.ep_size
        for member in range(first, first + p.ep_size):
            n = n_tokens[member // (p.cp_size * p.tp_size)]
            own = _share(n, p.cp_size, member // p.tp_size % p.cp_size)
            sizes.append(_share(own, p.tp_size, member % p.tp_size))
        return sizes

    def _even(self, sizes: Sequence[int]) -> Routing:
        n_slots = self.config.n_routed_experts + self.parallel.n_redundant_experts
        return Routing.even(sizes, n_slots, self.config.n_activated_experts)

    def _heads_for_tokens(self, own: int, tp: int) -> int:
        """Queries to the ranks of their tokens, and attention's outputs back to those of heads."""
        c, size = self.config, self.parallel.tp_size
        mine = _share(own, size, tp)
        heads = c.n_heads // size * c.head_dim * self.value_bytes
        return (own - mine) * heads + (size - 1) * mine * heads

    def _all_gathered(self, sizes: Sequence[int]) -> int:
        """Rows, choices and weights of all tokens to all ranks; sums of all their rows."""
        c, size = self.config, len(sizes)
        k, row = c.n_activated_experts, c.dim * self.value_bytes
        sent = 3 * _gathered(1, NUMBER, size)  # how many rows come
        sent += _gathered(max(sizes), row + k * (NUMBER + WIDE), size)
        return sent + _summed(sum(sizes) * k * c.dim * WIDE, size)

    def _sent_where_they_belong(self, routing: Routing, me: int) -> float:
        """Tokens with their choices to ranks of their experts; their rows from here back."""
        c, size = self.config, len(routing.tokens)
        k, values = c.n_activated_experts, c.dim * self.value_bytes
        out = c.dim + c.dim // FP8_GROUP if self.fp8 else values
        leaving = sum(routing.tokens[me]) - routing.tokens[me][me]
        back = sum(ranks[me] for ranks in routing.rows) - routing.rows[me][me]
        table = 2 * _gathered(1, NUMBER, size)
        table += _gathered(1 + 2 * size, NUMBER, size)
        return table + leaving * (out + NARROW * (1 + 2 * k)) + back * (values + NUMBER)


def boundary_bytes(config: ModelConfig, n_tokens: int, value_bytes: int, n_means: int = 0) -> int:
    """Return the bytes of streams from a stage to the next, and of DSpark's means with them."""
    return n_tokens * (config.hc_mult + n_means) * config.dim * value_bytes


def _share(n: int, size: int, index: int) -> int:
    return n // size + (index < n % size)


def _gathered(n_rows: int, row_bytes: int, size: int) -> int:
    return (size - 1) * n_rows * row_bytes


def _summed(n_bytes: int, size: int) -> int:
    return 2 * (size - 1) * n_bytes // size
