"""Write a folder of files made of a checkpoint: several at once, resumable, whole or not there.

A file has its name only once it is whole and on the disk, its record is written after it, and
the manifest last: whatever is there after a kill is whole, or is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import msgspec

from v4_ascend.checkpoint.damage import file_damage
from v4_ascend.checkpoint.folder import INDEX, MANIFEST, CheckpointFolder
from v4_ascend.checkpoint.manifest import (
    HALF,
    STARTED,
    FileEntry,
    FileRecord,
    FileState,
    Manifest,
    Source,
    read_record,
    record_name,
    write_whole,
)
from v4_ascend.checkpoint.rank_files import RankFile
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import CheckpointError, ConfigError, ShardError

COPIED = (".json", ".jinja", ".model", ".txt")  # config, tokenizer, and what else is beside them
Progress = Callable[[int, int], None]
Moved = Callable[[int], None]


class _Stopped(Exception):  # noqa: N818  # nobody meets it: another worker's error is raised
    """Another worker failed."""


@dataclass(frozen=True)
class Written:
    """What was done: all files, those that were there already, and bytes written."""

    manifest: Manifest
    n_kept: int
    bytes_written: int


class Recoder(Protocol):
    """What converts tensors on the way; `checkpoint.recoding` has it, with torch."""

    name: str
    config: ModelConfig

    def sources(self, file: RankFile) -> set[Path]:
        """Return the files of the checkpoint that a file is made of."""

    def make(self, file: RankFile, out: Path, moved: Moved) -> FileRecord:
        """Write one file."""

    def others(
        self, copies: Mapping[str, bytes], entries: Iterable[FileEntry], out: Path
    ) -> Mapping[str, bytes]:
        """Return what lies beside the tensors."""

    def alone(self) -> AbstractContextManager[None]:
        """Have the cores shared among workers alone."""


class Writing(ABC):
    """Files made of one checkpoint; nothing is written before `run`."""

    command: str  # the command it belongs to

    def __init__(self, folder: CheckpointFolder) -> None:
        self.folder = folder
        self.states = {f.name: FileState.of(f) for f in folder.files}
        self._stop = threading.Event()

    @property
    @abstractmethod
    def files(self) -> list[RankFile]:
        """Return what is to be written."""

    @abstractmethod
    def identity(self, source: Source) -> Manifest:
        """Return the manifest without files: what the folder is of."""

    @abstractmethod
    def make(self, file: RankFile, out: Path, moved: Moved) -> FileRecord:
        """Write one file; it has its name only once all of it is on the disk."""

    def sources(self, file: RankFile) -> set[Path]:
        """Return the files of the checkpoint that `make` reads."""
        return {self.folder.headers[h.spec.name].file for h in file.held}

    def others(self, entries: tuple[FileEntry, ...], out: Path) -> Mapping[str, bytes]:
        """Return what lies beside the tensors, by name: copies, unless something is changed."""
        return {
            file.name: file.read_bytes()
            for file in sorted(self.folder.path.iterdir())
            if file.suffix in COPIED and file.name not in (INDEX, MANIFEST) and file.is_file()
        }

    @property
    def bytes_to_write(self) -> int:
        """Bytes of tensors that are written."""
        return sum(f.data_bytes for f in self.files if f.link is None)

    def run(
        self,
        out: Path,
        *,
        resume: bool = False,
        workers: int = 2,
        progress: Progress = lambda done, total: None,
    ) -> Written:
        """Write the folder; `progress` sees bytes done and in all.

        Raises:
            ConfigError: `out` is taken, or is none of ours to resume.
            ShardError: it is of another plan or checkpoint, in use, or cannot be written.
            CheckpointError: the checkpoint cannot be read, or changed while it was.
        """
        identity = self.identity(self._source)
        try:
            with _claimed(out, identity, self.command, resume=resume):
                self.require_space(out)
                done = self._write(out, workers, progress)
                entries = tuple(e for e, _ in done)
                copied = self._write_others(entries, out)
                manifest = msgspec.structs.replace(identity, copied=copied, files=entries)
                _sync(out)
                manifest.write(out / MANIFEST)
                (out / STARTED).unlink(missing_ok=True)
                _sync(out)
        except OSError as e:
            raise ShardError(
                f"{e.filename or out}: {e.strerror}; what is whole stays, --resume goes on"
            ) from e
        kept = [e.name for e, was_there in done if was_there]
        written = sum(f.data_bytes for f in self.files if f.link is None and f.name not in kept)
        return Written(manifest, len(kept), written)

    def require_space(self, out: Path) -> None:
        """Refuse a disk that is too small for what is not there yet.

        Raises:
            ShardError: with what is needed and what is free.
        """
        there = sum(
            min(f.data_bytes, path.stat().st_size)
            for f in self.files
            if f.link is None and (path := out / f.name).exists()
        )
        needed, free = self.bytes_to_write - there, bytes_free(out)
        if needed > free:
            raise ShardError(f"{out}: {needed:,} bytes to write, its disk has {free:,} free")

    @cached_property
    def _source(self) -> Source:
        path = self.folder.path.resolve()
        return Source(
            path=str(path),
            revision=path.name if path.parent.name == "snapshots" else None,
            digest=self.folder.digest,
            files=self.states,
        )

    def _write(self, out: Path, workers: int, progress: Progress) -> list[tuple[FileEntry, bool]]:
        """Write or keep every file, several at once; the first error stops all."""
        total, lock, done = sum(f.data_bytes for f in self.files), threading.Lock(), 0

        def moved(n: int) -> None:
            nonlocal done
            if self._stop.is_set():
                raise _Stopped
            with lock:
                done += n
                progress(done, total)

        self._stop.clear()
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._one, out, file, moved) for file in self.files]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # an error, or Ctrl-C: files that are half done are removed by their workers
                if not all(f.done() and _error(f) is None for f in futures):
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
        errors = [e for f in futures if (e := _error(f)) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, _Stopped)), errors[0])
        return [f.result() for f in futures]

    def _one(
        self, out: Path, file: RankFile, moved: Callable[[int], None]
    ) -> tuple[FileEntry, bool]:
        record = self._kept(out, file, moved)
        if record is not None:
            return _entry(record), True
        self._require_unchanged(file)
        record = self.make(file, out, moved)
        try:
            self._require_unchanged(file)
        except CheckpointError:
            (out / file.name).unlink()
            raise
        write_whole(out / record_name(file.name), record.encoded())
        return _entry(record), False

    def _kept(self, out: Path, file: RankFile, moved: Callable[[int], None]) -> FileRecord | None:
        """Return the record of a file that is there, whole and as it should be."""
        if not (out / record_name(file.name)).exists():
            return None
        done = 0

        def counted(n: int) -> None:
            nonlocal done
            moved(n)
            done += n

        try:
            record = read_record(out / file.name)
        except CheckpointError:
            return None  # made again
        has = [(t.name, t.of_part) for t in record.tensors]
        if has != [(h.spec.name, h.part) for h in file.held]:
            return None
        if any(file_damage(out / file.name, record, counted, values=False)):
            moved(-done)
            return None
        return record

    def _require_unchanged(self, file: RankFile) -> None:
        for path in self.sources(file):
            was, now = self.states[path.name], FileState.of(path)
            if was != now:
                raise CheckpointError(
                    f"{path}: changed while {file.name} was made of it: {was.nbytes:,} bytes "
                    f"before, {now.nbytes:,} now; start again with a new --out"
                )

    def _write_others(self, entries: tuple[FileEntry, ...], out: Path) -> dict[str, str]:
        written = {}
        for name, data in self.others(entries, out).items():
            write_whole(out / name, data)
            written[name] = hashlib.sha256(data).hexdigest()
        return written


def bytes_free(out: Path) -> int:
    """Return what is free on the disk of a folder that need not be there yet."""
    return shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.is_dir())).free


@contextmanager
def _claimed(out: Path, identity: Manifest, command: str, *, resume: bool) -> Iterator[None]:
    """Hold the folder for one writer, and see that it is of this checkpoint and this result."""
    if out.exists() and not out.is_dir():
        raise ConfigError("--out", f"{out} is no folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ConfigError("--out", f"{out} is not empty; give a new folder, or --resume to go on")
    out.mkdir(parents=True, exist_ok=True)
    fd = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ShardError(f"{out}: another {command} writes there; wait for it or end it") from e
        found = next((f for f in (out / MANIFEST, out / STARTED) if f.exists()), None)
        if found is not None:
            _require_same(out, Manifest.read(found), identity)
        elif others := [p.name for p in out.iterdir() if not p.name.endswith(HALF)]:
            raise ConfigError(
                "--resume",
                f"{out} has no {MANIFEST} and was not made by {command}; it has {others[0]}",
            )
        if not (out / MANIFEST).exists():
            identity.write(out / STARTED)
        yield
    finally:
        os.close(fd)


def _require_same(out: Path, found: Manifest, ours: Manifest) -> None:
    if found.format != ours.format:
        raise ShardError(
            f"{out}: is in the format {found.format or 'of its checkpoint'}, --to is "
            f"{ours.format or 'not given'}; give another --out"
        )
    if (found.plan is None) != (ours.plan is None):
        raise ShardError(f"{out}: was made by another command; give another --out")
    if found.layout != ours.layout and ours.plan is None:
        raise ShardError(
            f"{out}: was converted with another recipe, calibration or configuration: digest "
            f"{found.layout}, now {ours.layout}; give another --out"
        )
    if found.layout != ours.layout:
        raise ShardError(
            f"{out}: is of another plan: its layout is {found.layout}, that of --plan is "
            f"{ours.layout}; give another --out"
        )
    if found.source.digest != ours.source.digest:
        raise ShardError(
            f"{out}: is of another checkpoint: {found.source.path} with digest "
            f"{found.source.digest}, {ours.source.path} has {ours.source.digest}; give "
            "another --out"
        )
    for name, state in ours.source.files.items():
        if (was := found.source.files.get(name)) != state:
            had = f"{was.nbytes:,} bytes, mtime {was.mtime_ns} ns" if was else "was not there"
            raise ShardError(
                f"{out}: {ours.source.path}/{name} is not the file it was when {out} was begun: "
                f"{had}; now {state.nbytes:,} bytes, mtime {state.mtime_ns} ns; give another --out"
            )
    if found.is_linked != ours.is_linked:
        way = "with" if found.is_linked else "without"
        raise ShardError(f"{out}: was begun {way} --link; go on {way} it")


def _entry(record: FileRecord) -> FileEntry:
    return FileEntry(
        name=record.name,
        rank=record.rank,
        nbytes=record.nbytes,
        digest=record.digest,
        record=hashlib.sha256(record.encoded()).hexdigest(),
    )


def _error(future: Future[tuple[FileEntry, bool]]) -> BaseException | None:
    return None if future.cancelled() else future.exception()


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk, not in memory alone."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
