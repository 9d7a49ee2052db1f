"""Headers of safetensors files, read without the tensors.

A file is 8 bytes of little-endian header length, a JSON object of name -> {dtype, shape,
data_offsets}, then the data.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from v4_ascend.config.inventory import ITEM_BYTES, Dtype
from v4_ascend.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor is: bytes [begin, end) of `file`, and their CRC-32 where one is recorded."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    crc32: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def read_header(file: Path) -> list[TensorHeader]:
    """Read every tensor's header, in the order of the data.

    Raises:
        CheckpointError: not a safetensors file, truncated, or its offsets make no sense.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            first = f.read(8)
            if len(first) < 8:
                raise CheckpointError(f"{file}: {size} bytes, too short for a safetensors file")
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: header of {length} bytes does not fit the file of {size} bytes"
                )
            text = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
    try:
        raw = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: header is not valid: {e}") from e
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: header must be a JSON object")
    raw.pop("__metadata__", None)
    headers = [_header(file, name, value, 8 + length) for name, value in raw.items()]
    headers.sort(key=lambda h: (h.begin, h.end))  # an empty tensor shares its begin
    _check_layout(file, headers, 8 + length, size)
    return headers


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return seen


def _header(file: Path, name: str, value: Any, data: int) -> TensorHeader:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            pass
        case _:
            raise CheckpointError(f"{file}: {name}: header entry is not valid: {value!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise CheckpointError(f"{file}: {name}: sizes must be whole numbers: {value!r}")
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{file}: {name}: dtype {dtype!r} is not one of {', '.join(ITEM_BYTES)}"
        )
    nbytes = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name}: {dtype} {shape} takes {nbytes} bytes, "
            f"its offsets {begin}..{end} hold {end - begin}"
        )
    return TensorHeader(name, dtype, tuple(shape), file, data + begin, data + end)


def _check_layout(file: Path, headers: list[TensorHeader], data: int, size: int) -> None:
    at = data
    for h in headers:
        if h.begin != at:
            kind = "overlaps the tensor before it" if h.begin < at else "leaves a gap before it"
            raise CheckpointError(f"{file}: {h.name}: starts at byte {h.begin}, {kind} ({at})")
        at = h.end
    if at != size:
        state = "is truncated" if at > size else "has bytes behind the last tensor"
        raise CheckpointError(f"{file}: {state}: {size} bytes, its header describes {at}")
