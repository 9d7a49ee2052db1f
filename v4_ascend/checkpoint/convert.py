"""Convert a checkpoint to another format: the same files, and a checkpoint again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from v4_ascend.checkpoint.folder import INDEX, CheckpointFolder
from v4_ascend.checkpoint.manifest import FileEntry, FileRecord, Manifest, Source
from v4_ascend.checkpoint.rank_files import RankFile
from v4_ascend.checkpoint.recoding import Recoding
from v4_ascend.checkpoint.writing import Moved, Progress, Writing, Written


class Conversion(Writing):
    """One checkpoint in another format; nothing is written before `run`."""

    command = "convert"

    def __init__(self, folder: CheckpointFolder, recoding: Recoding) -> None:
        super().__init__(folder)
        self.recoding = recoding
        self._files = recoding.files()

    @property
    def files(self) -> list[RankFile]:
        """Return one file for each of the checkpoint's."""
        return self._files

    def sources(self, file: RankFile) -> set[Path]:
        """Return the files of the checkpoint that a file is made of."""
        return self.recoding.sources(file)

    def identity(self, source: Source) -> Manifest:
        """Return the manifest without files."""
        return Manifest(
            source=source,
            plan=None,
            layout=self.recoding.digest,
            n_ranks=1,
            is_linked=False,
            format=self.recoding.name,
        )

    def run(
        self,
        out: Path,
        *,
        resume: bool = False,
        workers: int = 2,
        progress: Progress = lambda done, total: None,
    ) -> Written:
        """Write the folder, as `Writing.run`; torch gets one thread for each worker."""
        with self.recoding.alone():
            return super().run(out, resume=resume, workers=workers, progress=progress)

    def make(self, file: RankFile, out: Path, moved: Moved) -> FileRecord:
        """Convert one file."""
        return self.recoding.make(file, out, moved)

    def others(self, entries: tuple[FileEntry, ...], out: Path) -> Mapping[str, bytes]:
        """Return what lies beside the tensors."""
        made = self.recoding.others(super().others(entries, out), entries, out)
        files = {h.spec.name: f.name for f in self.files for h in f.held}
        total = sum(f.data_bytes for f in self.files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        return made | {INDEX: (json.dumps(index, indent=2) + "\n").encode()}
