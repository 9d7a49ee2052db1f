"""A checkpoint folder in the official layout, seen without a tensor library.

Shards with an index, or one file: names, headers and raw bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

from v4_ascend.checkpoint.header import TensorHeader, read_header
from v4_ascend.checkpoint.inspection import Inspection, inspect_headers
from v4_ascend.config.inventory import inventory
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "manifest.json"  # of a folder made for a plan
MAX_SHOWN = 20  # problems of one kind in a message
# What is read of a folder, or copied from it. A pickle is code, and is none of these.
READ = (".safetensors", ".json", ".jinja", ".model", ".txt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointFolder:
    """What a checkpoint has, from its headers alone."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; a checkpoint is a folder")
        require_inside(path)
        self.path = path
        self.config = ModelConfig.read(path)
        index = _Index.read(path)
        self.files = index.files
        self.total_size = index.total_size
        self.headers: Mapping[str, TensorHeader] = _headers(path, index)

    def check(self) -> Inspection:
        """Compare the headers with the inventory of the config."""
        return inspect_headers(self.headers, inventory(self.config), self.total_size)

    def require_complete(self) -> None:
        """Raise CheckpointError naming everything missing, unexpected or of another shape."""
        if problems := self.check().problems:
            shown = "\n".join(f"  - {p}" for p in problems[:MAX_SHOWN])
            more = len(problems) - MAX_SHOWN
            rest = f"\n  ... and {more} more" if more > 0 else ""
            raise CheckpointError(
                f"{self.path}: not the checkpoint its config describes:\n{shown}{rest}"
            )

    @cached_property
    def digest(self) -> str:
        """Digest of the config and of every header: what the tensors are, not their values."""
        parts = [self.config.model_dump_json()]
        parts += [f"{h.name} {h.dtype} {h.shape} {h.file.name}" for h in self.headers.values()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Index:
    """Which files there are, and what the index, if there is one, says of them."""

    files: tuple[Path, ...]
    claimed: Mapping[str, str]
    total_size: int | None

    @classmethod
    def read(cls, path: Path) -> _Index:
        file = path / INDEX
        if not file.exists():
            if (path / MANIFEST).exists():
                raise CheckpointError(
                    f"{path}: was made for one plan, which {MANIFEST} names; only `deploy` and "
                    "`inspect` read it. Give the checkpoint it was made from"
                )
            if not (path / SINGLE).is_file():
                pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
                has = "".join(f"; {p} is a pickle, which is never read" for p in pickles[:1])
                raise CheckpointError(f"{path}: neither {INDEX} nor {SINGLE} is there{has}")
            return cls((path / SINGLE,), {}, None)
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise CheckpointError(f"{file}: is not a safetensors index: {e}") from e
        match raw:
            case {"weight_map": dict(claimed)}:
                names = shard_names(file, claimed)
            case _:
                raise CheckpointError(f"{file}: weight_map must give a file name for each tensor")
        total_size: int | None = None
        match raw:
            case {"metadata": {"total_size": int(size)}}:
                total_size = size
        if missing := [n for n in names if not (path / n).is_file()]:
            raise CheckpointError(f"{file}: names files that are not there: {', '.join(missing)}")
        return cls(tuple(path / n for n in names), claimed, total_size)


def _headers(path: Path, index: _Index) -> dict[str, TensorHeader]:
    found: dict[str, TensorHeader] = {}
    for file in index.files:
        for header in read_header(file):
            if header.name in found:
                raise CheckpointError(
                    f"{path}: {header.name} is in {found[header.name].file.name} and in {file.name}"
                )
            found[header.name] = header
    for name, file_name in index.claimed.items():
        if name not in found or found[name].file.name != file_name:
            where = f"is in {found[name].file.name}" if name in found else "is in no file"
            raise CheckpointError(f"{path / INDEX}: {name} should be in {file_name}, {where}")
    return found


def shard_names(index: Path, weight_map: Mapping[str, object]) -> list[str]:
    """Return the files that an index names, each once, in order.

    Raises:
        CheckpointError: one is not the name of a safetensors file beside the index.
    """
    for name in weight_map.values():
        if not (is_file_name(name) and name.endswith(".safetensors")):
            raise CheckpointError(
                f"{index}: weight_map names {name!r}; it must be a .safetensors file beside it"
            )
    return sorted({str(name) for name in weight_map.values()})


def is_file_name(name: object) -> TypeGuard[str]:
    """Say whether it names a file in a folder, and nothing outside it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def require_inside(folder: Path) -> None:
    """Refuse a folder whose files are links to somewhere else; a hub's cache may lie around it.

    Raises:
        CheckpointError: naming the link and where it leads.
    """
    root = folder.resolve()
    # A hub keeps snapshots/REVISION/FILE as links to blobs/DIGEST of the same repository.
    around = root.parent.parent if root.parent.name == "snapshots" else root
    for file in folder.iterdir():
        if file.suffix in READ and file.is_symlink():
            target = file.resolve()
            if not target.is_relative_to(around):
                raise CheckpointError(
                    f"{file}: is a link to {target}, outside of the checkpoint; copy it, or make "
                    "a hard link"
                )
