"""Bytes from a checkpoint into one file of a rank, checksums made on the way.

The checksum of a tensor is CRC-32: on the way through the cache it costs less than half of the
copy. Copies of 2 GiB on the machine this was written on, GiB/s of one core: CRC-32 3.8, SHA-256
(with SHA instructions) 0.9, BLAKE2b 0.5, against a copy of about 2: with either hash the copy
would fall to a third of `cp`. It finds damage, not forgery.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.header import TensorHeader, read_header
from v4_ascend.checkpoint.manifest import (
    HALF,
    FileRecord,
    TensorErrors,
    TensorRecord,
    digest_of,
    write_all,
)
from v4_ascend.checkpoint.pieces import pieces, read_into
from v4_ascend.checkpoint.rank_files import RankFile
from v4_ascend.checkpoint.write_behind import WriteBehind
from v4_ascend.errors import ShardError
from v4_ascend.supernode.holdings import Part

CHUNK = 1 << 20  # bytes read, summed and written while they are in the cache of a core
Moved = Callable[[int], None]  # sees bytes done; raises to stop


def copy_file(folder: CheckpointFolder, file: RankFile, out: Path, moved: Moved) -> FileRecord:
    """Write one file of a rank; it has its name only once all of it is on the disk.

    Raises:
        OSError: reading or writing failed; `filename` says of what.
        CheckpointError: a file of the checkpoint became shorter.
    """
    files, buffer = OpenFiles(), memoryview(bytearray(CHUNK))
    header = file.header()
    try:
        with whole_file(out, file.name) as into:
            write_all(into, memoryview(header))
            records, at, behind = [], len(header), WriteBehind(into)

            def wrote(n: int) -> None:
                behind.wrote(n)
                moved(n)

            for h in file.held:
                source = folder.headers[h.spec.name]
                crc = _copy(files.open(source.file), source, h.part, into, buffer, wrote)
                records.append(_record(source, h.part, at, at + h.nbytes, crc))
                at += h.nbytes
    finally:
        files.close()
    return file_record(file, at, header, records)


@contextmanager
def whole_file(out: Path, name: str) -> Iterator[int]:
    """Give a file to write to; it has its name only once all of it is on the disk.

    Raises:
        OSError: writing failed; `filename` says of what.
    """
    half = out / f"{name}{HALF}"
    half.unlink(missing_ok=True)  # it may be a second name of a file of the checkpoint
    into = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        yield into
        os.fsync(into)
    except BaseException as e:
        half.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(half)
        raise
    finally:
        os.close(into)
    os.replace(half, out / name)


def link_file(folder: CheckpointFolder, file: RankFile, out: Path, moved: Moved) -> FileRecord:
    """Give a file of the checkpoint a second name; read it all for its checksums.

    Raises:
        ShardError: it is on another file system.
        OSError: reading it or making the name failed.
        CheckpointError: it became shorter.
    """
    if file.link is None:
        raise ValueError(f"{file.name} is no link")
    half = out / f"{file.name}{HALF}"
    half.unlink(missing_ok=True)
    real = file.link.resolve()
    if os.stat(real).st_dev != os.stat(out).st_dev:
        raise ShardError(
            f"--link: {real} is on another file system than {out}; leave --link away to copy"
        )
    buffer, files = memoryview(bytearray(CHUNK)), OpenFiles()
    try:
        records = [
            _record(h, None, h.begin, h.end, checksum(files.open(real), h, buffer, moved))
            for h in (folder.headers[x.spec.name] for x in file.held)
        ]
        data = read_header(real)[0].begin
        header = os.pread(files.open(real), data, 0)
    finally:
        files.close()
    # A rename between two names of one file does nothing: both would stay.
    (out / file.name).unlink(missing_ok=True)
    os.link(real, half)
    os.replace(half, out / file.name)
    return file_record(file, folder.headers[file.held[-1].spec.name].end, header, records)


def checksum(fd: int, header: TensorHeader, buffer: memoryview, moved: Moved) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    crc = 0
    for at in range(header.begin, header.end, len(buffer)):
        chunk = buffer[: min(len(buffer), header.end - at)]
        read_into(fd, header, at, chunk)
        crc = zlib.crc32(chunk, crc)
        moved(len(chunk))
    return crc


def _copy(
    fd: int,
    header: TensorHeader,
    part: Part | None,
    into: int,
    buffer: memoryview,
    moved: Moved,
) -> int:
    """Copy a part through the buffer, many short pieces at a time, and return its CRC-32."""
    crc = filled = 0

    def empty() -> None:
        nonlocal crc, filled
        chunk = buffer[:filled]
        crc = zlib.crc32(chunk, crc)
        write_all(into, chunk)
        moved(filled)
        filled = 0

    for begin, size in pieces(header, part):
        at, end = begin, begin + size
        while at < end:
            n = min(end - at, len(buffer) - filled)
            read_into(fd, header, at, buffer[filled : filled + n])
            at, filled = at + n, filled + n
            if filled == len(buffer):
                empty()
    if filled:
        empty()
    return crc


class OpenFiles:
    """Files open for reading, each once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def open(self, file: Path) -> int:
        """Return the file's descriptor."""
        fd = self._open.get(file)
        if fd is None:
            fd = self._open[file] = os.open(file, os.O_RDONLY)
        return fd

    def close(self) -> None:
        """Close all."""
        for fd in self._open.values():
            os.close(fd)


def _record(
    header: TensorHeader, part: Part | None, begin: int, end: int, crc: int
) -> TensorRecord:
    return TensorRecord(
        name=header.name,
        dtype=header.dtype,
        shape=part.shape(header.shape) if part else header.shape,
        part=(part.dim, part.index, part.count) if part else None,
        begin=begin,
        end=end,
        crc32=crc,
    )


def file_record(
    file: RankFile,
    nbytes: int,
    header: bytes,
    tensors: Iterable[TensorRecord],
    errors: Iterable[TensorErrors] = (),
) -> FileRecord:
    """Return the record of a file that was written."""
    in_order = tuple(tensors)
    digest = digest_of(header, [t.crc32 for t in in_order])
    return FileRecord(
        name=file.name,
        rank=file.rank,
        nbytes=nbytes,
        digest=digest,
        tensors=in_order,
        errors=tuple(errors),
    )
