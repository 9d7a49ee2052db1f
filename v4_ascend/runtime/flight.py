"""What a rank did last, for whoever has to find out why it stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Flight:
    """Counts a rank's exchanges; reading it from another thread is safe.

    `waiting` names the exchange a rank is in. Ranks that wait for another are all in one: the
    rank that is in none, or behind the others, is the one they wait for.
    """

    step: int = 0
    n_exchanges: int = 0
    waiting: str | None = None
    bytes_sent: Counter[str] = field(default_factory=Counter)  # by group

    @contextmanager
    def exchange(
        self, group: str, what: str, x: torch.Tensor, *, sends: bool = True
    ) -> Iterator[None]:
        """Count an exchange, and note that this rank is in it."""
        self.count(group, x, sends=sends)
        with self.wait(group, what, x):
            yield

    @contextmanager
    def wait(self, group: str, what: str, x: torch.Tensor) -> Iterator[None]:
        """Note that this rank waits for another; a wait that fails stays noted."""
        self.waiting = f"step {self.step}: {group} {what} {str(x.dtype)[6:]}{list(x.shape)}"
        yield
        self.waiting = None

    def count(self, group: str, x: torch.Tensor, *, sends: bool = True) -> None:
        """Count an exchange, and what is sent in it."""
        self.n_exchanges += 1
        if sends:
            self.bytes_sent[group] += x.numel() * x.element_size()
