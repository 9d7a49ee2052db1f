"""Tensors of a checkpoint, read before they are asked for, at several places of its files at once.

One reader keeps few disks busy, and what goes through the page cache takes memory twice and is
copied once more. So bytes that nobody else reads come by direct I/O, unless the cache has them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch

from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.pieces import pieces, read_into
from v4_ascend.checkpoint.reader import as_tensor, empty_bytes
from v4_ascend.errors import CheckpointError
from v4_ascend.supernode.holdings import Part

AHEAD_BYTES = 128 << 20  # of tensors that nobody has asked for yet; one that is larger comes alone
BATCH_BYTES = AHEAD_BYTES // 4  # whose pieces are read in the order of the files
N_PLACES = 8
RUN_BYTES = 4 << 20  # of one read
GAP_BYTES = 16 << 10  # of direct I/O: skipping fewer takes longer than reading them
DIRECT_BYTES = 128 << 10  # shorter reads go through the cache: the kernel joins them
_mincore: Any = ctypes.CDLL(None).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
PAGE = 4096  # direct I/O wants memory, offsets and sizes in whole ones


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a file, and where they belong."""

    header: TensorHeader
    at: int
    into: np.ndarray

    @property
    def end(self) -> int:
        return self.at + len(self.into)


@dataclass(slots=True)
class _Coming:
    """A tensor that is being read."""

    header: TensorHeader
    part: Part | None
    data: torch.Tensor  # uint8
    reads: list[Future[None]] = field(default_factory=list)


class ReadAhead:
    """Gives tensors, or parts of them, each once; best in the order in which they are listed.

    Of what nobody has asked for yet it holds `AHEAD_BYTES`, or one larger tensor, and a buffer of
    `RUN_BYTES` for each of `N_PLACES` threads. Leaving the context ends all reads. What other
    processes of the host read too, `shared`, goes through the page cache: the disk gives it once.
    """

    def __init__(
        self,
        coming: Iterable[tuple[TensorHeader, Part | None]],
        shared: Collection[str] = (),
    ) -> None:
        self._listed = {h.name: (h, part) for h, part in coming}
        self._shared = shared
        self._coming: dict[str, _Coming] = {}
        self._ahead = 0  # bytes of all of them
        self._pool = ThreadPoolExecutor(N_PLACES, thread_name_prefix="read-ahead")
        self._own = threading.local()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, or the part that was listed, when all of it has been read.

        Raises:
            CheckpointError: it is not listed, was given before, or is not what was recorded of it.
            OSError: it cannot be read; `filename` says of which file.
        """
        if name not in self._coming:  # its turn, or before it
            if name not in self._listed:
                raise CheckpointError(f"no tensor {name} is left to read")
            self._ask([name])
        found = self._coming.pop(name)
        self._ahead -= found.data.nbytes
        self._fill()
        for read in found.reads:
            read.result()
        return as_tensor(found.header, found.part, found.data)

    def _fill(self) -> None:
        """Ask for what comes next, as long as there is room for a batch."""
        while self._listed and self._ahead <= AHEAD_BYTES - BATCH_BYTES:
            names, nbytes = [], 0
            for name, (header, part) in self._listed.items():
                size = header.nbytes // (part.count if part else 1)
                held = self._ahead + nbytes
                if nbytes >= BATCH_BYTES or (held and held + size > AHEAD_BYTES):
                    break
                names.append(name)
                nbytes += size
            if not names:
                return
            self._ask(names)

    def _ask(self, names: Sequence[str]) -> None:
        for is_shared in (False, True):
            wanted: list[_Piece] = []
            for name in (n for n in names if (n in self._shared) is is_shared):
                header, part = self._listed.pop(name)
                self._coming[name] = found = _Coming(header, part, empty_bytes(header, part))
                self._ahead += found.data.nbytes
                wanted += _cut(found)
            # Of what goes through the cache every piece is read by itself, and no gap.
            for run in _runs(wanted, RUN_BYTES if is_shared else GAP_BYTES):
                read = self._pool.submit(self._read, run, is_shared)
                for of in {p.header.name for p in run}:
                    self._coming[of].reads.append(read)

    def _read(self, run: Sequence[_Piece], is_shared: bool) -> None:
        """Fill the pieces of a run; of two that cannot be read the error names the first."""
        fd = os.open(run[0].header.file, os.O_RDONLY)
        try:
            is_small = sum(len(p.into) for p in run) < DIRECT_BYTES
            if is_shared or is_small or _is_cached(fd, run) or not self._directly(run):
                for p in run:
                    read_into(fd, p.header, p.at, p.into.data)
        finally:
            os.close(fd)

    def _directly(self, run: Sequence[_Piece]) -> bool:
        """Fill a run around the page cache; False where that does not go, whatever the reason.

        Plain reads then get the bytes, or find out what is wrong, and with which tensor.
        """
        buffer: mmap.mmap | None = getattr(self._own, "buffer", None)
        if buffer is None:  # begins at a page, as it must
            buffer = self._own.buffer = mmap.mmap(-1, RUN_BYTES + 2 * PAGE)
        first = run[0].at // PAGE * PAGE
        size = -(-(run[-1].end - first) // PAGE) * PAGE
        try:
            fd = os.open(run[0].header.file, os.O_RDONLY | os.O_DIRECT)
            try:
                n = os.preadv(fd, [memoryview(buffer)[:size]], first)
            finally:
                os.close(fd)
        except OSError:
            return False
        if first + n < run[-1].end:
            return False
        has = np.frombuffer(buffer, dtype=np.uint8)
        for p in run:
            p.into[:] = has[p.at - first : p.end - first]  # numpy lets other threads run meanwhile
        return True


def _is_cached(fd: int, run: Sequence[_Piece]) -> bool:
    """Say whether the page cache has all of a run, as far as one may know. Nothing is read.

    A read that shall not wait (RWF_NOWAIT) would tell too, but has Linux 6.18 read ahead.
    """
    may_ask = os.fstat(fd).st_uid == os.geteuid() or os.access(run[0].header.file, os.W_OK)
    first = run[0].at // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    size = run[-1].end - first
    if not may_ask or run[-1].end > os.fstat(fd).st_size:  # to others mincore says yes of all
        return False
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ, offset=first) as pages:
        is_there = bytearray(-(-size // mmap.PAGESIZE))
        at = np.frombuffer(pages, dtype=np.uint8).ctypes.data
        found = _mincore(at, size, (ctypes.c_ubyte * len(is_there)).from_buffer(is_there))
    return found == 0 and all(flags & 1 for flags in is_there)


def _cut(found: _Coming) -> Iterator[_Piece]:
    """Yield what a tensor consists of, none longer than a run and each ending at a page."""
    into = found.data.numpy()
    for at, size in pieces(found.header, found.part):
        end = at + size
        while at < end:
            n = min(end, (at // RUN_BYTES + 1) * RUN_BYTES) - at
            yield _Piece(found.header, at, into[:n])
            at, into = at + n, into[n:]


def _runs(wanted: Iterable[_Piece], gap: int) -> Iterator[list[_Piece]]:
    """Join what lies in a file at most so far apart, in the order of the files."""
    run: list[_Piece] = []
    for p in sorted(wanted, key=lambda p: (p.header.file, p.at)):
        if run and (
            p.header.file != run[0].header.file
            or p.at - run[-1].end > gap
            or p.end - run[0].at > RUN_BYTES
        ):
            yield run
            run = []
        run.append(p)
    if run:
        yield run
