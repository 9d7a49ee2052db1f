"""Copies of what a sequence needs beside its pages to go on: window rows and compressor states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from v4_ascend.model.batch import LayerCache


@dataclass(frozen=True)
class Snapshots:
    """Room for copies taken at the end of pages, where windows fill one block exactly.

    There an HCA group has just been completed, so that only CSA's states carry anything.

    Shapes of each pair, by number: a storage [n, ...], and its copies [n_snapshots, ...]
    """

    windows: Sequence[tuple[torch.Tensor, torch.Tensor]]
    states: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, layers: Sequence[LayerCache], n_snapshots: int) -> Snapshots:
        """Allocate copies of some layers' caches."""

        def room(storage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return storage, storage.new_zeros(n_snapshots, *storage.shape[1:])

        # The indexer is where the state is CSA's.
        states = [s for c in layers if c.index_state is not None for s in (c.state, c.index_state)]
        return cls([room(c.window) for c in layers], [room(s) for s in states if s is not None])

    def save(self, block: int, slot: int, number: int) -> None:
        """Copy a block of every window, and a slot's states."""
        for at, pairs in ((block, self.windows), (slot, self.states)):
            for storage, copies in pairs:
                copies[number].copy_(storage[at])

    def restore(self, block: int, slot: int, number: int) -> None:
        """Copy them back, to another block and slot."""
        for at, pairs in ((block, self.windows), (slot, self.states)):
            for storage, copies in pairs:
                storage[at].copy_(copies[number])
