"""How fast tensors are read, against the plain read of the same bytes, in turns on one disk.

Loading a model takes plain reads with the kernel told what comes next. The other ways are timed
beside it on demand: the choice is measured, and can be measured again on another machine.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.read_ahead import ReadAhead
from v4_ascend.checkpoint.reader import Checkpoint, read_tensor

PIECE = 4 << 20  # of a plain read; more leaves the cache, and what Linux reads ahead
PAGE = 4096  # direct I/O wants offsets and sizes in whole ones
N_AT_ONCE = 2
LOAD, RAW = "tensors", "raw read"


@dataclass(frozen=True, kw_only=True)
class LoadSpeed:
    """Bytes of all tensors, and the seconds of the best round of each way, by its name."""

    nbytes: int
    seconds: Mapping[str, float]


def load_speed(
    checkpoint: Checkpoint,
    *,
    rounds: int,
    is_cold: bool,
    every_way: bool = False,
    progress: Callable[[int, int], None],
) -> LoadSpeed:
    """Read every tensor, then every file from end to end into one buffer, in turns.

    Cold, the kernel is asked to forget each file before it is read again.
    """
    headers = list(checkpoint.headers.values())
    files = sorted({h.file for h in headers})
    ways: dict[str, Callable[[], None]] = {LOAD: lambda: _as_loaded(headers)}
    if every_way:
        ways |= {
            "tensors, nothing asked for ahead": lambda: _plainly(headers),
            f"tensors, {N_AT_ONCE} files at once": lambda: _at_once(headers, files),
            "tensors, copied out of mapped files": lambda: _mapped(headers, files),
            "tensors, direct I/O": lambda: _direct(headers, files),
        }
    ways[RAW] = lambda: _raw(files)
    seconds = {name: float("inf") for name in ways}
    for number in range(rounds):
        for name, read in ways.items():
            if is_cold:
                _forget(files)
            begun = time.perf_counter()
            read()
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
        progress(number + 1, rounds)
    return LoadSpeed(nbytes=sum(h.nbytes for h in headers), seconds=seconds)


def _forget(files: Iterable[Path]) -> None:
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)  # what is not on the disk yet cannot be forgotten
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _as_loaded(headers: Collection[TensorHeader]) -> None:
    """Read as `runtime.load` does."""
    with ReadAhead((h, None) for h in headers) as ahead:
        for h in headers:
            ahead.tensor(h.name)


def _plainly(headers: Iterable[TensorHeader]) -> None:
    for h in headers:
        read_tensor(h)


def _at_once(headers: Iterable[TensorHeader], files: Iterable[Path]) -> None:
    by_file = {f: [h for h in headers if h.file == f] for f in files}
    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        list(pool.map(_plainly, by_file.values()))


def _mapped(headers: Iterable[TensorHeader], files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            view = memoryview(pages)
            for h in headers:
                if h.file == file:
                    data = torch.empty(h.nbytes, dtype=torch.uint8)
                    data.numpy().data[:] = view[h.begin : h.end]
            view.release()


def _direct(headers: Iterable[TensorHeader], files: Iterable[Path]) -> None:
    most = max(h.nbytes for h in headers) + 2 * PAGE
    buffer = memoryview(mmap.mmap(-1, -(-most // PAGE) * PAGE))  # begins at a page, as it must
    for file in files:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            for h in headers:
                if h.file != file:
                    continue
                first, at = h.begin // PAGE * PAGE, 0
                while first + at < h.end:  # the file may end in the last page
                    size = -(-(h.end - first - at) // PAGE) * PAGE
                    at += os.preadv(fd, [buffer[at : at + size]], first + at)
                data = torch.empty(h.nbytes, dtype=torch.uint8)
                data.numpy().data[:] = buffer[h.begin - first : h.end - first]
        finally:
            os.close(fd)


def _raw(files: Iterable[Path]) -> None:
    buffer = memoryview(bytearray(PIECE))
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
