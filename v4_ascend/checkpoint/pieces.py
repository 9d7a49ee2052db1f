"""Raw bytes of a tensor, or of a part of it, in the file it is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod

from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.errors import CheckpointError
from v4_ascend.supernode.holdings import Part


def pieces(header: TensorHeader, part: Part | None) -> Iterator[tuple[int, int]]:
    """Yield offset and size of what makes up a part: one piece, or one for each index before it."""
    if part is None:
        yield header.begin, header.nbytes
        return
    first, end = part.bounds(header.shape)
    n_pieces, length = prod(header.shape[: part.dim]), header.shape[part.dim]
    row = header.nbytes // max(1, n_pieces * length)
    for i in range(n_pieces):
        yield header.begin + (i * length + first) * row, (end - first) * row


def read_into(fd: int, header: TensorHeader, at: int, into: memoryview) -> None:
    """Fill `into` from offset `at`.

    Raises:
        CheckpointError: the file ends before.
        OSError: it cannot be read; `filename` says which.
    """
    done = 0
    while done < len(into):
        try:
            n = os.preadv(fd, [into[done:]], at + done)
        except OSError as e:
            e.filename = str(header.file)
            raise
        if not n:
            raise CheckpointError(f"{header.file}: {header.name}: the file became shorter")
        done += n
