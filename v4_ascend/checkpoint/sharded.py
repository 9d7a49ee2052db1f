"""A folder made for a plan, and what a rank reads of it: its own files, from begin to end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from v4_ascend.checkpoint.damage import file_damage
from v4_ascend.checkpoint.folder import INDEX, MANIFEST, CheckpointFolder, require_inside
from v4_ascend.checkpoint.header import TensorHeader, read_header
from v4_ascend.checkpoint.manifest import (
    STARTED,
    FileEntry,
    FileRecord,
    Manifest,
    read_record,
    record_name,
)
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import CheckpointError
from v4_ascend.supernode.holdings import Part, holdings, layout_digest
from v4_ascend.supernode.plan import Plan


class ShardedFolder:
    """What `shard` wrote, from its manifest alone."""

    def __init__(self, path: Path) -> None:
        require_inside(path)
        self.path = path
        self.manifest = Manifest.read(path / MANIFEST)
        self.config = ModelConfig.read(path)

    def check(self) -> tuple[str, ...]:
        """Return what is wrong with names, sizes and records; no data is read."""
        return tuple(p for entry in self.manifest.files for p in self._problems(entry))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.nbytes for entry in self.manifest.files)

    def damage(self, moved: Callable[[int], None]) -> Iterator[str]:
        """Read everything; yield what is not as it was written, or is no number.

        `moved` sees bytes done.
        """
        for entry in self.manifest.files:
            if problems := tuple(self._problems(entry)):
                yield from problems
                moved(entry.nbytes)
                continue
            record = read_record(self.path / entry.name)
            yield from file_damage(self.path / entry.name, record, moved, values=True)
        for name, digest in self.manifest.copied.items():
            try:
                data = (self.path / name).read_bytes()
            except OSError as e:
                yield f"{name}: cannot be read: {e.strerror}"
                continue
            if (has := hashlib.sha256(data).hexdigest()) != digest:
                yield f"{name}: has the SHA-256 {has}, {MANIFEST} says {digest}"

    def require_complete(self) -> None:
        """Raise CheckpointError naming every file that is missing or of another size."""
        self._require(self.check())

    def require_layout(self, plan: Plan) -> None:
        """Refuse a plan of another layout.

        Raises:
            CheckpointError: it was made for another one; the message has both digests.
        """
        if (asked := layout_digest(self.config, plan)) != self.manifest.layout:
            raise CheckpointError(
                f"{self.path}: was made for the layout {self.manifest.layout} of "
                f"{self.manifest.n_ranks} ranks, this plan has {asked} of {len(plan.ranks)}; "
                f"v4-ascend shard {self.manifest.source.path} for this plan"
            )

    def records(self, rank: int | None = None) -> Iterator[FileRecord]:
        """Yield the records of a rank's files, or of all.

        Raises:
            CheckpointError: a record is not the one the manifest lists.
        """
        for entry in self.manifest.files:
            if rank in (None, entry.rank):
                self._require(tuple(self._problems(entry)))
                yield read_record(self.path / entry.name)

    def rank_headers(self, plan: Plan, rank: int) -> dict[str, TensorHeader]:
        """Return where the tensors of a rank are, in reading order.

        Raises:
            CheckpointError: the plan is of another layout, or a file is not the one recorded.
        """
        self.require_layout(plan)
        found: dict[str, TensorHeader] = {}
        parts: dict[str, Part | None] = {}
        for record in self.records(rank):
            file = self.path / record.name
            headers = {h.name: h for h in read_header(file)}
            for t in record.tensors:
                h = headers.get(t.name)
                if h is None or (h.dtype, h.shape, h.begin) != (t.dtype, t.shape, t.begin):
                    raise CheckpointError(f"{file}: {t.name}: is not where its record says")
                found[t.name], parts[t.name] = replace(h, crc32=t.crc32), t.of_part
        wanted = holdings(self.config, plan, plan.ranks[rank])
        if parts != {name: h.part for name, h in wanted.items()}:
            differ = sorted(parts.keys() ^ wanted.keys()) or [
                name for name, h in wanted.items() if parts[name] != h.part
            ]
            raise CheckpointError(f"{self.path}: rank {rank}: {differ[0]} is not what it reads")
        return found

    @property
    def _command(self) -> str:
        return "convert" if self.manifest.plan is None else "shard"

    def _problems(self, entry: FileEntry) -> Iterator[str]:
        file = self.path / entry.name
        record = self.path / record_name(entry.name)
        try:
            if (size := file.stat().st_size) != entry.nbytes:
                yield f"{entry.name}: {size:,} bytes, {MANIFEST} says {entry.nbytes:,}"
            if hashlib.sha256(record.read_bytes()).hexdigest() != entry.record:
                yield f"{record.name}: is not the one that {MANIFEST} lists"
        except OSError as e:
            yield f"{Path(e.filename).name}: cannot be read: {e.strerror}"

    def _require(self, problems: tuple[str, ...]) -> None:
        if problems:
            shown = "\n".join(f"  - {p}" for p in problems[:20])
            raise CheckpointError(
                f"{self.path}: not what {MANIFEST} says; make it again with v4-ascend "
                f"{self._command} --resume:\n{shown}"
            )


def is_sharded(path: Path) -> bool:
    """Say whether a folder was made by `shard`.

    Raises:
        CheckpointError: it was, and not to its end.
    """
    if (path / INDEX).exists():
        return False
    if (path / STARTED).exists() and not (path / MANIFEST).exists():
        command = "convert" if Manifest.read(path / STARTED).plan is None else "shard"
        raise CheckpointError(f"{path}: {command} has not ended there; go on with --resume")
    return (path / MANIFEST).exists()


def open_folder(path: Path) -> CheckpointFolder | ShardedFolder:
    """Open a checkpoint, or what `shard` made of one.

    Raises:
        CheckpointError: it is neither.
    """
    return ShardedFolder(path) if is_sharded(path) else CheckpointFolder(path)
