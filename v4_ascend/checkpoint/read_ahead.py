"""Asking the kernel for pages of a checkpoint before they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice

from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.pieces import pieces
from v4_ascend.supernode.holdings import Part

AHEAD_BYTES = 256 << 20
MOST_PIECES = 256  # of a tensor; one cut finer is left to the kernel's own guess


class ReadAhead:
    """Keeps the disk busy with coming tensors while earlier ones are widened or sent to a device.

    Only bytes that will be read are asked for, in the order in which they will be, from as many
    files as they are in: a rank of a hundred reads a hundredth, and prefetches no more.
    """

    def __init__(self, coming: Iterable[tuple[TensorHeader, Part | None]]) -> None:
        self._coming = iter(coming)
        self._asked: dict[str, int] = {}  # bytes of each that is not read yet
        self._ahead = 0  # bytes of all of them
        self._read: set[str] = set()

    def reading(self, name: str) -> None:
        """Note that a tensor is read now, and ask for what follows it."""
        if name in self._asked:
            self._ahead -= self._asked.pop(name)
        else:
            self._read.add(name)  # before its turn
        while self._ahead < AHEAD_BYTES:
            if (found := next(self._coming, None)) is None:
                return
            header, part = found
            if header.name not in self._read:
                nbytes = header.nbytes // (part.count if part else 1)
                self._asked[header.name] = nbytes
                self._ahead += nbytes
                _ask(header, part)


def _ask(header: TensorHeader, part: Part | None) -> None:
    wanted = list(islice(pieces(header, part), MOST_PIECES + 1))
    if not header.nbytes or len(wanted) > MOST_PIECES:
        return
    fd = os.open(header.file, os.O_RDONLY)
    try:
        for at, size in wanted:
            os.posix_fadvise(fd, at, size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
