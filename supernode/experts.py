"""Which rank of an EP group holds which experts: by number, or by a trace of their load.

Busy experts get further copies and all copies are packed onto ranks so that none is much busier
than the mean: the greedy balancer of DeepSeek's published EPLB (replicate, then pack).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from pathlib import Path

from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import ConfigError

LayerPlacement = tuple[tuple[int, ...], ...]  # experts of each rank of an EP group, by slot
SAMPLED_LAYERS = 8  # enough to compare layouts by; the chosen one is placed layer by layer


@dataclass(frozen=True)
class ExpertLoad:
    """Tokens each routed expert of each layer got, as ``[layer][expert]``, and from where."""

    counts: tuple[tuple[int, ...], ...]
    source: str

    @classmethod
    def read(cls, file: Path, config: ModelConfig) -> ExpertLoad:
        """Read ``{"version": 1, "counts": [[tokens of expert 0, ...] of layer 0, ...]}``.

        Raises:
            ConfigError: it cannot be read, or is no trace of this model.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(str(file), f"cannot be read: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise ConfigError(str(file), f"is not UTF-8 text: {e.reason}") from e
        except ValueError as e:
            raise ConfigError(str(file), f"is not JSON: {e}") from e
        if not isinstance(data, dict) or data.get("version") != 1 or "counts" not in data:
            raise ConfigError(str(file), 'is no trace of expert load: {"version": 1, "counts": []}')
        rows, n_layers, n = data["counts"], config.n_layers, config.n_routed_experts
        if not isinstance(rows, list) or len(rows) != n_layers:
            has = len(rows) if isinstance(rows, list) else type(rows).__name__
            raise ConfigError(str(file), f"counts: must have {n_layers} layers, has {has}")
        for layer, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != n:
                has = len(row) if isinstance(row, list) else type(row).__name__
                raise ConfigError(str(file), f"counts[{layer}]: must have {n} experts, has {has}")
            if bad := [x for x in row if type(x) is not int or x < 0]:
                raise ConfigError(str(file), f"counts[{layer}]: {bad[0]!r} is no count of tokens")
            if not any(row):
                raise ConfigError(str(file), f"counts[{layer}]: no expert got a token")
        return cls(tuple(map(tuple, rows)), str(file))

    def imbalance(self, ep_size: int, n_redundant: int) -> float:
        """Return the busiest rank's tokens over the mean, averaged over a sample of layers."""
        step = max(1, len(self.counts) // SAMPLED_LAYERS)
        sample = self.counts[::step]
        return sum(
            rank_imbalance(row, place_layer(row, ep_size, n_redundant)) for row in sample
        ) / len(sample)

    def place(self, ep_size: int, n_redundant: int) -> tuple[LayerPlacement, ...]:
        """Place all experts and copies of every layer."""
        return tuple(place_layer(row, ep_size, n_redundant) for row in self.counts)


def by_number(n_experts: int, ep_size: int) -> LayerPlacement:
    """Give each rank of an EP group an equal run of consecutive experts, the last what is left."""
    share = -(-n_experts // ep_size)
    return tuple(
        tuple(range(rank * share, min((rank + 1) * share, n_experts))) for rank in range(ep_size)
    )


def place_layer(counts: Sequence[int], ep_size: int, n_redundant: int) -> LayerPlacement:
    """Copy the busiest experts and pack all copies: equally many on a rank, none there twice.

    Raises:
        ValueError: the copies do not divide by the ranks.
    """
    n = len(counts) + n_redundant
    if n % ep_size:
        raise ValueError(f"{n} copies of experts over {ep_size} ranks")
    slots = n // ep_size
    copies = _copies(counts, n_redundant, most=ep_size)
    # The busiest first, each to the least busy rank that has room and not this expert.
    items = sorted(
        ((counts[e] / k, e) for e, k in enumerate(copies) for _ in range(k)),
        key=lambda item: (-item[0], item[1]),
    )
    ranks: list[set[int]] = [set() for _ in range(ep_size)]
    busy = [0.0] * ep_size
    for load, expert in items:
        free = [r for r in range(ep_size) if len(ranks[r]) < slots and expert not in ranks[r]]
        if not free:
            _swap_in(ranks, expert, slots)
            continue
        rank = min(free, key=lambda r: (busy[r], r))
        ranks[rank].add(expert)
        busy[rank] += load
    return tuple(tuple(sorted(experts)) for experts in ranks)


def rank_imbalance(counts: Sequence[int], placement: LayerPlacement) -> float:
    """Return the busiest rank's tokens over the mean; copies of an expert share its tokens."""
    copies: dict[int, int] = {}
    for experts in placement:
        for e in experts:
            copies[e] = copies.get(e, 0) + 1
    busy = [sum(counts[e] / copies[e] for e in experts) for experts in placement]
    return max(busy) * len(busy) / sum(busy)


def _copies(counts: Sequence[int], n_redundant: int, most: int) -> list[int]:
    """Give each further copy to the expert with the most tokens for each of its copies."""
    if n_redundant > len(counts) * (most - 1):
        raise ValueError(f"{n_redundant} copies of {len(counts)} experts over {most} ranks")
    copies = [1] * len(counts)
    heap = [(-float(count), expert) for expert, count in enumerate(counts)]
    heapify(heap)
    for _ in range(n_redundant):
        while copies[heap[0][1]] >= most:  # on every rank already
            heapreplace(heap, (1.0, heap[0][1]))
        expert = heap[0][1]
        copies[expert] += 1
        heapreplace(heap, (-counts[expert] / copies[expert], expert))
    return copies


def _swap_in(ranks: list[set[int]], expert: int, slots: int) -> None:
    """Place the last copies, whose only free ranks have the expert: another rank makes room."""
    free = next(r for r in ranks if len(r) < slots)
    for other in ranks:
        if expert not in other and (moved := min(other - free, default=None)) is not None:
            other.remove(moved)
            other.add(expert)
            free.add(moved)
            return
    raise ValueError(f"no rank has room for another copy of expert {expert}")
