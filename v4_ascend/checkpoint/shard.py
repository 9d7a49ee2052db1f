"""Lay a checkpoint out for a plan: each rank's tensors in files of its own, in reading order.

Bytes are copied as they are, through a small buffer for each worker, without a tensor library;
or, with a `Recoder`, converted on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from v4_ascend.checkpoint.copying import copy_file, link_file
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.manifest import FileEntry, FileRecord, Manifest, Source
from v4_ascend.checkpoint.rank_files import RankFile, rank_files
from v4_ascend.checkpoint.writing import Moved, Progress, Recoder, Writing, Written
from v4_ascend.supernode.holdings import layout_digest
from v4_ascend.supernode.plan import Plan


class Sharding(Writing):
    """One checkpoint laid out for one plan; nothing is written before `run`."""

    command = "shard"

    def __init__(
        self,
        folder: CheckpointFolder,
        plan: Plan,
        *,
        is_linked: bool = False,
        recoding: Recoder | None = None,
    ) -> None:
        super().__init__(folder)
        self.plan, self.is_linked, self.recoding = plan, is_linked, recoding
        self.config = recoding.config if recoding else folder.config
        self._files = rank_files(self.config, plan, links_to=folder if is_linked else None)

    @property
    def files(self) -> list[RankFile]:
        """Return the files of all ranks."""
        return self._files

    def bytes_of_ranks(self) -> list[int]:
        """Bytes of tensors of each rank."""
        sizes = [0] * len(self.plan.ranks)
        for file in self.files:
            sizes[file.rank] += file.data_bytes
        return sizes

    def sources(self, file: RankFile) -> set[Path]:
        """Return the files of the checkpoint that a file is made of."""
        return self.recoding.sources(file) if self.recoding else super().sources(file)

    def identity(self, source: Source) -> Manifest:
        """Return the manifest without files."""
        return Manifest(
            source=source,
            plan=self.plan.digest,
            layout=layout_digest(self.config, self.plan),
            n_ranks=len(self.plan.ranks),
            is_linked=self.is_linked,
            format=self.recoding.name if self.recoding else None,
        )

    def run(
        self,
        out: Path,
        *,
        resume: bool = False,
        workers: int = 2,
        progress: Progress = lambda done, total: None,
    ) -> Written:
        """Write the folder, as `Writing.run`."""
        with self.recoding.alone() if self.recoding else nullcontext():
            return super().run(out, resume=resume, workers=workers, progress=progress)

    def make(self, file: RankFile, out: Path, moved: Moved) -> FileRecord:
        """Copy, convert or link one file."""
        if self.recoding:
            return self.recoding.make(file, out, moved)
        make = copy_file if file.link is None else link_file
        return make(self.folder, file, out, moved)

    def others(self, entries: tuple[FileEntry, ...], out: Path) -> Mapping[str, bytes]:
        """Return what lies beside the tensors."""
        copies = super().others(entries, out)
        return self.recoding.others(copies, entries, out) if self.recoding else copies
