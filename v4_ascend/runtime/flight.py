"""What a rank did last, for whoever has to find out why it stopped."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from v4_ascend.ops.op import Op

FRONT = "front"  # not a group: between two steps of its a rank waits for the front


@dataclass
class Flight:
    """Counts a rank's exchanges; reading it from another thread is safe.

    `waiting` names the exchange a rank is in. Ranks that wait for another are all in one: the
    rank that is in none, or behind the others, is the one they wait for.

    `operator` is the last one that was called, and `dispatch` the shapes of the rows and choices
    that the last dispatch was given.

    `bytes_sent` are those that leave this rank, as `supernode.traffic` says. `waited_s` is the
    time spent in exchanges, and with `FRONT` that between two steps.
    """

    step: int = 0
    n_exchanges: int = 0
    waiting: str | None = None
    operator: str | None = None
    dispatch: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    bytes_sent: Counter[str] = field(default_factory=Counter)  # by group
    waited_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by group

    def called(self, op: Op[..., Any], kernel: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Make the call of an operator, and note that it was made: a `Policy.around`."""
        self.operator = op.name
        if op.name == "moe_dispatch":
            self.dispatch = tuple(args[0].shape), tuple(args[1].shape)
        return kernel(*args, **named)

    @contextmanager
    def exchange(self, group: str, what: str, x: torch.Tensor, n_bytes: int) -> Iterator[None]:
        """Count an exchange in which `n_bytes` leave, and note that this rank is in it."""
        self.count(group, n_bytes)
        with self.wait(group, what, x):
            yield

    @contextmanager
    def wait(self, group: str, what: str, x: torch.Tensor) -> Iterator[None]:
        """Note that this rank waits for another; a wait that fails stays noted."""
        self.waiting = f"step {self.step}: {group} {what} {str(x.dtype)[6:]}{list(x.shape)}"
        with self.clock(group):
            yield
        self.waiting = None

    @contextmanager
    def clock(self, group: str) -> Iterator[None]:
        """Add the time in here to what was waited for a group, or for the next step."""
        began = time.perf_counter()
        yield
        self.waited_s[group] += time.perf_counter() - began

    def count(self, group: str, n_bytes: int) -> None:
        """Count an exchange, and what leaves in it."""
        self.n_exchanges += 1
        self.bytes_sent[group] += n_bytes
