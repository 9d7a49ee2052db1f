"""What is wrong with tensors in files: other bytes than recorded, values that are no numbers."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.manifest import FileRecord, digest_of
from v4_ascend.checkpoint.pieces import read_into
from v4_ascend.errors import CheckpointError

CHUNK = 1 << 20  # bytes looked at while they are in the cache of a core; whole values of any dtype
SCALES = (".scale", ".weight_scale")
Moved = Callable[[int], None]


def file_damage(file: Path, record: FileRecord, moved: Moved, *, values: bool) -> Iterator[str]:
    """Yield what differs between a file and its record, one sentence each.

    With `values`, also what is no number, or no expert.
    """
    try:
        size = file.stat().st_size
        if size != record.nbytes:
            yield f"{file.name}: {size:,} bytes, recorded are {record.nbytes:,}"
            moved(sum(t.end - t.begin for t in record.tensors))
            return
        fd = os.open(file, os.O_RDONLY)
    except OSError as e:
        yield f"{file.name}: cannot be read: {e.strerror}"
        return
    try:
        for t in record.tensors:
            header = TensorHeader(t.name, t.dtype, t.shape, file, t.begin, t.end)
            crc, problems = look(fd, header, moved, values=values)
            if crc != t.crc32:
                yield (
                    f"{file.name}: {t.name}: bytes {t.begin:,}..{t.end:,} have the CRC-32 "
                    f"{crc:08x}, recorded is {t.crc32:08x}"
                )
            yield from (f"{file.name}: {t.name}: {p}" for p in problems)
        first = os.pread(fd, record.tensors[0].begin if record.tensors else size, 0)
    finally:
        os.close(fd)
    if digest_of(first, [t.crc32 for t in record.tensors]) != record.digest:
        yield f"{file.name}: its header is not the recorded one"


def look(fd: int, header: TensorHeader, moved: Moved, *, values: bool) -> tuple[int, list[str]]:
    """Return a tensor's CRC-32, and with `values` what is wrong with them.

    Raises:
        CheckpointError: the file ends before.
    """
    buffer = memoryview(bytearray(min(CHUNK, header.nbytes)))
    crc = n_bad = 0
    for at in range(header.begin, header.end, CHUNK):
        chunk = buffer[: min(CHUNK, header.end - at)]
        read_into(fd, header, at, chunk)
        crc = zlib.crc32(chunk, crc)
        if values:
            n_bad += count_bad(header, chunk)
        moved(len(chunk))
    if not n_bad:
        return crc, []
    what = "are negative" if header.dtype == "I64" else "are not finite"
    if header.name.endswith(SCALES):
        what = "are no scales (NaN, infinite, zero or negative)"
    return crc, [f"{n_bad:,} values {what}"]


def count_bad(header: TensorHeader, chunk: memoryview) -> int:
    """Count values that no checkpoint has: NaN, infinity, scales that are not above zero.

    Every byte of packed FP4 is two numbers.
    """
    match header.dtype:
        case "BF16":
            bad = np.frombuffer(chunk, np.uint16) & 0x7F80 == 0x7F80
        case "F32":
            value = np.frombuffer(chunk, np.float32)
            bad = ~np.isfinite(value)
            if header.name.endswith(SCALES):
                bad |= value <= 0
        case "F8_E4M3":
            bad = np.frombuffer(chunk, np.uint8) & 0x7F == 0x7F
        case "F8_E8M0" | "U8":
            bad = np.frombuffer(chunk, np.uint8) == 0xFF
        case "I64":
            bad = np.frombuffer(chunk, np.int64) < 0
        case "I8":
            return 0
    return int(np.count_nonzero(bad))


def checkpoint_damage(headers: list[TensorHeader], moved: Moved) -> Iterator[str]:
    """Yield what is no number among the tensors of a checkpoint, file by file."""
    for file in dict.fromkeys(h.file for h in headers):
        try:
            fd = os.open(file, os.O_RDONLY)
        except OSError as e:
            yield f"{file.name}: cannot be read: {e.strerror}"
            continue
        try:
            for h in (h for h in headers if h.file == file):
                problems = look(fd, h, moved, values=True)[1]
                yield from (f"{file.name}: {h.name}: {p}" for p in problems)
        except (CheckpointError, OSError) as e:
            yield str(e)
        finally:
            os.close(fd)
