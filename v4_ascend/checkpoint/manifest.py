"""What a folder made by `shard` or `convert` says of itself.

`manifest.json` says which checkpoint and which layout or format it is of, and lists the files.
What a file has, tensor by tensor, stands in a record beside it: all of them together would be 1.7
million entries for Pro on 384 ranks, of which a rank needs its own. Nothing in either depends on
the time or the machine, so that the same work twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from v4_ascend.checkpoint.folder import MANIFEST, is_file_name
from v4_ascend.config.inventory import Dtype
from v4_ascend.errors import CheckpointError
from v4_ascend.supernode.holdings import Part

STARTED = f"{MANIFEST}.partial"  # the manifest without files, while they are written
HALF = ".partial"  # ending of a file that is not whole yet
T = TypeVar("T")


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class TensorRecord(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor of a file: bytes [begin, end), and the CRC-32 of them.

    `part` is dimension, index and count of the equal part it is of the checkpoint's tensor.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    part: tuple[int, int, int] | None = None
    begin: int
    end: int
    crc32: int

    @property
    def of_part(self) -> Part | None:
        """Return the part, as holdings have it."""
        return Part(*self.part) if self.part else None


class TensorErrors(_Record, frozen=True, kw_only=True):
    """How far one converted weight, or the part of it in a file, is from the one it was made of.

    `rms` is of the source, where something was rounded. `n_changed` values differ at all.
    """

    name: str
    values: int
    n_changed: int
    max_error: float
    rms_error: float
    rms: float

    @property
    def relative(self) -> float:
        """Return the RMS of the error as a part of the RMS of the values."""
        return self.rms_error / self.rms if self.rms else 0.0


class FileRecord(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """One file: its tensors in order, and the digest of its header and their checksums.

    `errors` has the weights that were converted, not those that were copied.
    """

    name: str
    rank: int
    nbytes: int
    digest: str
    tensors: tuple[TensorRecord, ...]
    errors: tuple[TensorErrors, ...] = ()

    def encoded(self) -> bytes:
        """Return the bytes of the record's own file."""
        return msgspec.json.encode(self) + b"\n"


class FileEntry(_Record, frozen=True, kw_only=True):
    """A file as the manifest lists it; `record` is the sha256 of its record."""

    name: str
    rank: int
    nbytes: int
    digest: str
    record: str


class FileState(_Record, frozen=True, kw_only=True):
    """Size and time of a file of the source, by which a change is seen."""

    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Look at a file now.

        Raises:
            CheckpointError: it is gone.
        """
        try:
            stat = file.stat()
        except OSError as e:
            raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
        return cls(nbytes=stat.st_size, mtime_ns=stat.st_mtime_ns)


class Source(_Record, frozen=True, kw_only=True):
    """The checkpoint it was made from; the digest covers config, names, dtypes and shapes."""

    path: str
    revision: str | None
    digest: str
    files: dict[str, FileState]


class Manifest(_Record, frozen=True, kw_only=True):
    """Which checkpoint, which layout, which files; `copied` has the sha256 of other files.

    `format` is what `--to` asked for. Without a plan it is of `convert`, and `layout` a digest of
    what was converted how.
    """

    version: Literal[1] = 1
    source: Source
    plan: str | None
    layout: str
    format: str | None = None
    n_ranks: int
    is_linked: bool
    copied: dict[str, str] = {}
    files: tuple[FileEntry, ...] = ()

    def of_rank(self, rank: int) -> tuple[FileEntry, ...]:
        """Return a rank's files, in the order it reads them."""
        return tuple(f for f in self.files if f.rank == rank)

    def write(self, file: Path) -> None:
        """Write it whole or not at all."""
        write_whole(file, msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Read a manifest.

        Raises:
            CheckpointError: it cannot be read, is none of this version, or names files that are
                not beside it.
        """
        found = _decoded(file, cls)
        for name in (*(f.name for f in found.files), *found.copied):
            if not is_file_name(name):
                raise CheckpointError(f"{file}: {name!r} is not the name of a file beside it")
        return found


def record_name(file: str) -> str:
    """Name the record of a file."""
    return f"{file.removesuffix('.safetensors')}.record.json"


def read_record(file: Path) -> FileRecord:
    """Read the record beside `file`.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    return _decoded(file.with_name(record_name(file.name)), FileRecord)


def digest_of(header: bytes, checksums: Sequence[int]) -> str:
    """Return the digest of a file: its first bytes, up to the data, and each tensor's CRC-32."""
    joined = b"".join(c.to_bytes(4, "little") for c in checksums)
    return hashlib.sha256(header + joined).hexdigest()


def write_whole(file: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: writing failed; `filename` says of what.
    """
    half = file.with_name(f".{file.name}{HALF}")
    fd = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(fd, memoryview(data))
        os.fsync(fd)
    except OSError as e:
        half.unlink(missing_ok=True)
        e.filename = str(half)
        raise
    finally:
        os.close(fd)
    os.replace(half, file)


def write_all(fd: int, data: memoryview) -> None:
    """Write all of it, however little a single write takes."""
    while data:
        data = data[os.write(fd, data) :]


def _decoded(file: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
    except msgspec.DecodeError as e:
        raise CheckpointError(f"{file}: is damaged, or of another version: {e}") from e
