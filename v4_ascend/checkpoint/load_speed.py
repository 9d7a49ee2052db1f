"""How fast tensors are read, against the plain read of the same bytes, in turns on one disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from v4_ascend.checkpoint.reader import Checkpoint

PIECE = 16 << 20  # of a plain read, as cp and dd would


@dataclass(frozen=True, kw_only=True)
class LoadSpeed:
    """Bytes of all tensors, and the seconds of the best round of each way."""

    nbytes: int
    tensors: float
    raw: float


def load_speed(
    checkpoint: Checkpoint,
    *,
    rounds: int,
    is_cold: bool,
    progress: Callable[[int, int], None],
) -> LoadSpeed:
    """Read every tensor, then every file from end to end into one buffer, in turns.

    Cold, the kernel is asked to forget each file before it is read again.
    """
    files = sorted({h.file for h in checkpoint.headers.values()})
    seconds: dict[str, list[float]] = {"tensors": [], "raw": []}

    def tensors() -> None:
        for _ in checkpoint.stream():
            pass

    def raw() -> None:
        buffer = memoryview(bytearray(PIECE))
        for file in files:
            with file.open("rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass

    for number in range(rounds):
        for name, read in (("tensors", tensors), ("raw", raw)):
            if is_cold:
                for file in files:
                    fd = os.open(file, os.O_RDONLY)
                    os.fsync(fd)  # what is not on the disk yet cannot be forgotten
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(fd)
            begun = time.perf_counter()
            read()
            seconds[name].append(time.perf_counter() - begun)
        progress(number + 1, rounds)
    nbytes = sum(h.nbytes for h in checkpoint.headers.values())
    return LoadSpeed(nbytes=nbytes, tensors=min(seconds["tensors"]), raw=min(seconds["raw"]))
