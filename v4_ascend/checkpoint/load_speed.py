"""How fast tensors are read, against raw reads of the same bytes, in turns on one disk.

A raw read keeps nothing; the fastest of several is what a load is compared with. The other ways to
read tensors are timed on demand: the choice is measured, and can be measured again elsewhere.
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
from v4_ascend.checkpoint.read_ahead import N_PLACES, ReadAhead
from v4_ascend.checkpoint.reader import Checkpoint, read_tensor

PIECE = 4 << 20  # of a plain read; more leaves the cache, and what Linux reads ahead
LOAD, RAW = "tensors", "raw read"


@dataclass(frozen=True, kw_only=True)
class LoadSpeed:
    """Bytes of all tensors, and the seconds of the best round of each way, by its name.

    `RAW` are those of the fastest raw read; `raw` says which it was.
    """

    nbytes: int
    seconds: Mapping[str, float]
    raw: str


def load_speed(
    checkpoint: Checkpoint,
    *,
    rounds: int,
    is_cold: bool,
    every_way: bool = False,
    progress: Callable[[int, int], None],
) -> LoadSpeed:
    """Read every tensor, then every file from end to end in several ways, in turns.

    Cold, the kernel is asked to forget each file before it is read again.
    """
    headers = list(checkpoint.headers.values())
    files = sorted({h.file for h in headers})
    ways: dict[str, Callable[[], None]] = {LOAD: lambda: _as_loaded(headers)}
    if every_way:
        ways |= {
            "tensors, one place through the cache": lambda: _plainly(headers),
            "tensors, copied out of mapped files": lambda: _mapped(headers, files),
        }
    raw: dict[str, Callable[[], None]] = {"one place through the cache": lambda: _raw(files)}
    if _take_direct(files):
        raw[f"{N_PLACES} places, direct I/O"] = lambda: _raw_directly(files)
    if not is_cold:
        raw["one place into fresh memory"] = lambda: _raw(files, is_fresh=True)
    ways |= {f"raw, {name}": read for name, read in raw.items()}
    seconds = {name: float("inf") for name in ways}
    for number in range(rounds):
        for name, read in ways.items():
            if is_cold:
                _forget(files)
            begun = time.perf_counter()
            read()
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
        progress(number + 1, rounds)
    fastest = min(raw, key=lambda name: seconds[f"raw, {name}"])
    seconds[RAW] = seconds[f"raw, {fastest}"]
    return LoadSpeed(nbytes=sum(h.nbytes for h in headers), seconds=seconds, raw=fastest)


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


def _mapped(headers: Iterable[TensorHeader], files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            view = memoryview(pages)
            for h in headers:
                if h.file == file:
                    data = torch.empty(h.nbytes, dtype=torch.uint8)
                    data.numpy().data[:] = view[h.begin : h.end]
            view.release()


def _raw(files: Iterable[Path], *, is_fresh: bool = False) -> None:
    """Read through the page cache, into one buffer or into memory that is new each time."""
    buffer = memoryview(bytearray(PIECE))
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(mmap.mmap(-1, PIECE) if is_fresh else buffer):
                pass


def _take_direct(files: Iterable[Path]) -> bool:
    """Say whether the file system lets files be read around the page cache."""
    try:
        for file in files:
            os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _raw_directly(files: Iterable[Path]) -> None:
    """Read around the page cache, pieces of all files at several places at once."""
    places = iter([(f, at) for f in files for at in range(0, f.stat().st_size, PIECE)])

    def read(_: int) -> None:
        buffer = mmap.mmap(-1, PIECE)  # begins at a page, as it must
        for file, at in places:  # a list's iterator gives each to one thread
            fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(fd, [buffer], at)
            finally:
                os.close(fd)

    with ThreadPoolExecutor(N_PLACES) as pool:
        list(pool.map(read, range(N_PLACES)))
