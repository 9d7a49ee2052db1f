"""Tensors of a checkpoint folder."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from v4_ascend.checkpoint.damage import SCALES
from v4_ascend.checkpoint.folder import MANIFEST, CheckpointFolder
from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.pieces import pieces, read_into
from v4_ascend.checkpoint.sharded import ShardedFolder
from v4_ascend.config.inventory import Dtype
from v4_ascend.errors import CheckpointError
from v4_ascend.supernode.holdings import Part
from v4_ascend.supernode.plan import Plan

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class Checkpoint(CheckpointFolder):
    """Reads tensors by their official names, in their official dtypes.

    Opening reads headers alone; a tensor is read when it is asked for and kept by nobody. Of what
    `convert` made, a tensor that is read whole is compared with its checksum.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if (path / MANIFEST).exists():
            recorded = {t.name: t.crc32 for r in ShardedFolder(path).records() for t in r.tensors}
            self.headers = {
                name: replace(h, crc32=recorded.get(name)) for name, h in self.headers.items()
            }

    def tensor(self, name: str, part: Part | None = None) -> torch.Tensor:
        """Read one tensor, or a part of it and none of the rest.

        FP4 comes as the int8 and scales as the E8M0 they are stored as.

        Raises:
            CheckpointError: it is not there, not what was recorded of it, or a scale that is not a
                number.
        """
        header = self.headers.get(name)
        if header is None:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        return read_tensor(header, part)

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor in file order, one at a time."""
        for name in self.headers:
            yield name, self.tensor(name)


class RankCheckpoint:
    """What `shard` laid out for one rank; tensors come as the parts the rank reads."""

    def __init__(self, folder: ShardedFolder, plan: Plan, rank: int) -> None:
        self.path, self.config = folder.path, folder.config
        self.headers: Mapping[str, TensorHeader] = folder.rank_headers(plan, rank)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: the rank does not hold it, it is not what was recorded of it, or a
                scale that is not a number.
        """
        header = self.headers.get(name)
        if header is None:
            raise CheckpointError(f"{self.path}: no tensor {name} for this rank")
        return read_tensor(header)


def read_tensor(header: TensorHeader, part: Part | None = None) -> torch.Tensor:
    """Read one tensor, or a part of it and none of the rest.

    Raises:
        CheckpointError: the file became shorter, the bytes are not those recorded, or a scale is
            not a number.
    """
    data = empty_bytes(header, part)
    into = data.numpy().data
    with header.file.open("rb", buffering=0) as f:
        for at, size in pieces(header, part) if header.nbytes else ():
            read_into(f.fileno(), header, at, into[:size])
            into = into[size:]
    return as_tensor(header, part, data)


def empty_bytes(header: TensorHeader, part: Part | None) -> torch.Tensor:
    """Return memory for a tensor, or a part of it, as uint8.

    It is not cleared before: that would take as long as the read.
    """
    return torch.empty(header.nbytes // (part.count if part else 1), dtype=torch.uint8)


def as_tensor(header: TensorHeader, part: Part | None, data: torch.Tensor) -> torch.Tensor:
    """Give bytes, uint8, that were read their dtype and shape; check them.

    Raises:
        CheckpointError: the bytes are not those recorded, or a scale is not a number.
    """
    dtype = TORCH_DTYPES[header.dtype]
    if not header.nbytes:
        return torch.empty(header.shape, dtype=dtype)
    if header.crc32 is not None and part is None:
        _check_bytes(header, data)
    tensor = data.view(dtype).view(part.shape(header.shape) if part else header.shape)
    if header.name.endswith(SCALES):
        _check_scale(header, tensor)
    return tensor


def _check_bytes(header: TensorHeader, data: torch.Tensor) -> None:
    if (crc := zlib.crc32(data.numpy().data)) != header.crc32:
        raise CheckpointError(
            f"{header.file}: {header.name}: bytes {header.begin:,}..{header.end:,} have the CRC-32 "
            f"{crc:08x}, recorded is {header.crc32:08x}; the file is damaged: what made it makes "
            "it again with --resume"
        )


def _check_scale(header: TensorHeader, scale: torch.Tensor) -> None:
    is_e8m0 = header.dtype in ("F8_E8M0", "U8")
    # By numpy: torch's threads would spin behind each check on cores that reading needs.
    if is_e8m0:
        is_nan = scale.view(torch.uint8).numpy() == 255
    else:
        is_nan = ~np.isfinite(scale.float().numpy())
    if is_nan.any():
        raise CheckpointError(
            f"{header.file}: {header.name}: {int(is_nan.sum())} of {scale.numel()} scales are "
            "not numbers; the file is damaged"
        )
