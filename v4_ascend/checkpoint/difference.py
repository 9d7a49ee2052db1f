"""What two checkpoints do not have in common: tensors, dtypes, shapes, bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from v4_ascend.checkpoint.damage import CHUNK
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.pieces import read_into


def common_bytes(a: CheckpointFolder, b: CheckpointFolder) -> int:
    """Sum the tensors whose bytes are compared, once."""
    return sum(h.nbytes for h in a.headers.values() if _is_alike(h, b.headers.get(h.name)))


def differences(
    a: CheckpointFolder, b: CheckpointFolder, moved: Callable[[int], None]
) -> Iterator[str]:
    """Yield each difference, one sentence each; files may be cut differently.

    Raises:
        CheckpointError: a file became shorter.
        OSError: a file cannot be read.
    """
    for name in sorted(a.headers.keys() - b.headers.keys()):
        yield f"{name}: only in {a.path}"
    for name in sorted(b.headers.keys() - a.headers.keys()):
        yield f"{name}: only in {b.path}"
    for name, one in a.headers.items():
        other = b.headers.get(name)
        if other is None:
            continue
        if not _is_alike(one, other):
            yield (
                f"{name}: {one.dtype} {list(one.shape)} in {a.path}, "
                f"{other.dtype} {list(other.shape)} in {b.path}"
            )
        elif (first := _first_difference(one, other, moved)) is not None:
            yield f"{name}: bytes differ from byte {first:,} of {one.nbytes:,} on"


def _is_alike(one: TensorHeader, other: TensorHeader | None) -> bool:
    return other is not None and (one.dtype, one.shape) == (other.dtype, other.shape)


def _first_difference(
    one: TensorHeader, other: TensorHeader, moved: Callable[[int], None]
) -> int | None:
    buffers = [memoryview(bytearray(min(CHUNK, one.nbytes))) for _ in range(2)]
    files = [os.open(h.file, os.O_RDONLY) for h in (one, other)]
    try:
        for at in range(0, one.nbytes, CHUNK):
            n = min(CHUNK, one.nbytes - at)
            for fd, header, buffer in zip(files, (one, other), buffers, strict=True):
                read_into(fd, header, header.begin + at, buffer[:n])
            moved(n)
            x, y = (bytes(buffer[:n]) for buffer in buffers)
            if x != y:
                return at + next(i for i in range(n) if x[i] != y[i])
    finally:
        for fd in files:
            os.close(fd)
    return None
