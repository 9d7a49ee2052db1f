"""What a rank did last, for whoever has to find out why it stopped."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

FRONT = "front"  # not a group: between two steps of its a rank waits for the front


@dataclass
class Flight:
    """Counts a rank's exchanges; reading it from another thread is safe.

    `waiting` names the exchange a rank is in. Ranks that wait for another are all in one: the
    rank that is in none, or behind the others, is the one they wait for.

    `bytes_sent` are those that leave this rank, as `supernode.traffic` says. `waited_s` is the
    time spent in exchanges, and with `FRONT` that between two steps.
    """

    step: int = 0
    n_exchanges: int = 0
    waiting: str | None = None
    bytes_sent: Counter[str] = field(default_factory=Counter)  # by group
    waited_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by group

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
