"""Layers to pipeline stages: contiguous, the slowest stage as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def balance(
    costs: Sequence[float], pp_size: int, first: float = 0.0, last: float = 0.0
) -> tuple[tuple[int, int], ...]:
    """Split layers into `pp_size` half-open ranges so that the largest sum is least.

    `first` and `last` are what the first and the last stage have besides: embedding, head.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    n = len(costs)
    if pp_size > n:
        raise ValueError(f"{pp_size} stages of {n} layers")
    total = [0.0, *accumulate(costs)]
    low = max(max(costs), total[n] / pp_size)
    high = total[n] + first + last
    best = _pack(total, pp_size, high, first, last)
    while best is not None and high - low > 1e-4 * high:
        limit = (low + high) / 2
        if (tried := _pack(total, pp_size, limit, first, last)) is None:
            low = limit
        else:
            best, high = tried, limit
    if best is None:  # one layer a stage, whatever it costs
        raise AssertionError("a limit of everything must fit")
    return best


def _pack(
    total: Sequence[float], pp_size: int, limit: float, first: float, last: float
) -> tuple[tuple[int, int], ...] | None:
    """Fill stages from the back, each up to `limit`, leaving a layer for each one before."""
    end, stages = len(total) - 1, []
    for stage in reversed(range(pp_size)):
        extra = (first if stage == 0 else 0.0) + (last if stage == pp_size - 1 else 0.0)
        start = end - 1
        while start > stage and total[end] - total[start - 1] + extra <= limit:
            start -= 1
        if stage == 0:
            start = 0
        if total[end] - total[start] + extra > limit * (1 + 1e-12):
            return None
        stages.append((start, end))
        end = start
    return tuple(reversed(stages))
