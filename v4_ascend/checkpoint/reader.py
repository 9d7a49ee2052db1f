"""A checkpoint folder in the official layout: shards with an index, or one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path

import torch

from v4_ascend.checkpoint.header import TensorHeader, read_header
from v4_ascend.checkpoint.inspection import Inspection, inspect_headers
from v4_ascend.config.inventory import Dtype, inventory
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import CheckpointError
from v4_ascend.supernode.holdings import Part

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I64": torch.int64,
}
MAX_SHOWN = 20  # problems of one kind in a message


class Checkpoint:
    """Reads tensors by their official names, in their official dtypes.

    Opening reads headers alone; a tensor is read when it is asked for and kept by nobody.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; a checkpoint is a folder")
        self.path = path
        self.config = ModelConfig.read(path)
        index = _Index.read(path)
        self.total_size = index.total_size
        self.headers: Mapping[str, TensorHeader] = _headers(path, index)

    def tensor(self, name: str, part: Part | None = None) -> torch.Tensor:
        """Read one tensor, or a part of it and none of the rest.

        FP4 comes as the int8 and scales as the E8M0 they are stored as.

        Raises:
            CheckpointError: it is not there, or it is a scale that is not a number.
        """
        header = self.headers.get(name)
        if header is None:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        dtype = TORCH_DTYPES[header.dtype]
        if not header.nbytes:
            return torch.empty(header.shape, dtype=dtype)
        shape = list(header.shape)
        # Plain reads: one copy, no alignment to mind, no mapped pages that outlive the load.
        buffer = bytearray(header.nbytes // (part.count if part else 1))
        with header.file.open("rb", buffering=0) as f:
            if part is None:
                _read(f, header, header.begin, memoryview(buffer))
            else:
                first, end = part.bounds(header.shape)
                shape[part.dim] = end - first
                _read_part(f, header, part.dim, first, end, memoryview(buffer))
        tensor = torch.frombuffer(buffer, dtype=dtype).view(shape)
        if name.endswith(".scale"):
            _check_scale(header, tensor)
        return tensor

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor in file order, one at a time."""
        for name in self.headers:
            yield name, self.tensor(name)

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


def _read(f: FileIO, header: TensorHeader, at: int, into: memoryview) -> None:
    f.seek(at)
    done = 0
    while done < len(into):
        n = f.readinto(into[done:])
        if not n:
            raise CheckpointError(f"{header.file}: {header.name}: the file became shorter")
        done += n


def _read_part(
    f: FileIO, header: TensorHeader, dim: int, first: int, end: int, into: memoryview
) -> None:
    """Read [first, end) along a dimension: one piece, or one for each index before it."""
    n_pieces = prod(header.shape[:dim])
    row = header.nbytes // max(1, n_pieces * header.shape[dim])
    size = (end - first) * row
    for i in range(n_pieces):
        at = header.begin + (i * header.shape[dim] + first) * row
        _read(f, header, at, into[i * size : (i + 1) * size])


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
            if not (path / SINGLE).exists():
                raise CheckpointError(f"{path}: neither {INDEX} nor {SINGLE} is there")
            return cls((path / SINGLE,), {}, None)
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise CheckpointError(f"{file}: is not a safetensors index: {e}") from e
        match raw:
            case {"weight_map": dict(claimed)} if all(map(_is_file_name, claimed.values())):
                names = sorted(set(claimed.values()))
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


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _check_scale(header: TensorHeader, scale: torch.Tensor) -> None:
    is_nan = scale.view(torch.uint8) == 255 if header.dtype == "F8_E8M0" else ~scale.isfinite()
    if bool(is_nan.any()):
        raise CheckpointError(
            f"{header.file}: {header.name}: {int(is_nan.sum())} of {scale.numel()} scales are "
            "not numbers; the file is damaged"
        )
