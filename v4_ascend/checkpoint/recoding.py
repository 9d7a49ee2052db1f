"""A checkpoint's tensors in another format, file by file. Imports torch: it decodes.

A weight is converted a few rows at a time and written where it belongs in the file: memory is the
same for every size. What does not change is copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from v4_ascend.checkpoint.codecs import BLOCK, Parts, RowErrors, Stored
from v4_ascend.checkpoint.copying import CHUNK, OpenFiles, file_record, whole_file
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.manifest import FileEntry, FileRecord, TensorErrors, TensorRecord
from v4_ascend.checkpoint.pieces import pieces, read_into
from v4_ascend.checkpoint.rank_files import RankFile
from v4_ascend.checkpoint.reader import TORCH_DTYPES
from v4_ascend.checkpoint.report import REPORT, report_of
from v4_ascend.checkpoint.row_conversion import converted
from v4_ascend.checkpoint.write_behind import WriteBehind
from v4_ascend.checkpoint.writing import Moved
from v4_ascend.config.inventory import TensorSpec, inventory
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.precision import Format, Recipe, in_weights
from v4_ascend.config.quant_types import DESCRIPTION, base_of, describe
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.holdings import Held, Part

CHUNK_VALUES = 1 << 19  # of a weight at a time: what is made of them stays near the core's cache
T = TypeVar("T", TensorSpec, TensorHeader)
FORMAT_KEYS = ("quantization_config", "expert_dtype", "torch_dtype", "dtype", "quantize")
DIGITS = 5  # of error statistics: sums in another order agree in so many


class Recoding:
    """One checkpoint in another format; nothing is read before `make`."""

    def __init__(
        self,
        folder: CheckpointFolder,
        format: Format,
        recipe: Recipe | None,
        calibration: Path | None = None,
    ) -> None:
        self.folder, self.recipe = folder, recipe
        self.name: str = format
        self.config: ModelConfig = in_weights(folder.config, format, recipe)
        self._sources = _by_base(folder.headers.values())
        self._importance = _read_calibration(calibration, self._sources) if calibration else {}
        self._calibration = calibration

    @cached_property
    def targets(self) -> dict[str, list[TensorSpec]]:
        """Return the tensors to be made, by the linear layer they belong to."""
        return _by_base(inventory(self.config))

    @cached_property
    def digest(self) -> str:
        """Digest of what decides the values: configuration, recipe and calibration."""
        used = {
            "format": self.name,
            "config": self.config.model_dump(mode="json"),
            "calibration": hashlib.sha256(self._calibration.read_bytes()).hexdigest()
            if self._calibration
            else None,
        }
        return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let torch use one thread: workers share the cores, and sums are made in one order."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def files(self) -> list[RankFile]:
        """Lay out one file for each file of the checkpoint."""
        held: dict[Path, list[Held]] = {f: [] for f in self.folder.files}
        for base, headers in self._sources.items():
            held[headers[0].file] += [Held(t, None) for t in self.targets[base]]
        return [RankFile(f.name, 0, tuple(h)) for f, h in held.items()]

    def sources(self, file: RankFile) -> set[Path]:
        """Return the files of the checkpoint that a file is made of."""
        bases = {base_of(h.spec.name) for h in file.held}
        return {h.file for base in bases for h in self._sources[base]}

    def make(self, file: RankFile, out: Path, moved: Moved) -> FileRecord:
        """Write one file; it has its name only once all of it is on the disk.

        Raises:
            OSError: reading or writing failed; `filename` says of what.
            CheckpointError: a file of the checkpoint became shorter.
        """
        header, files = file.header(), OpenFiles()
        errors: list[TensorErrors] = []
        try:
            with whole_file(out, file.name) as into:
                _write_at(into, memoryview(header), 0)
                behind = WriteBehind(into)

                def wrote(n: int) -> None:
                    behind.wrote(n)
                    moved(n)

                sinks = _sinks(into, file, len(header), wrote)
                for base, members in groupby(file.held, lambda h: base_of(h.spec.name)):
                    errors += self._linear(base, list(members), sinks, files)
        finally:
            files.close()
        records = [s.record() for s in sinks.values()]
        return file_record(file, len(header) + file.data_bytes, header, records, errors)

    def _linear(
        self, base: str, held: list[Held], sinks: Mapping[str, _Sink], files: OpenFiles
    ) -> Iterator[TensorErrors]:
        """Write the tensors of one linear layer, or one tensor that is of none."""
        headers = {h.name: h for h in self._sources[base]}
        if {(h.name, h.dtype, h.shape) for h in headers.values()} == {
            (t.name, t.dtype, t.shape) for t in self.targets[base]
        }:
            for h in held:
                _copy(headers[h.spec.name], h.part, sinks[h.spec.name], files)
            return
        source, target = Stored.of(headers.values()), Stored.of(self.targets[base])
        writer = _Weight(base, target, held, sinks)
        importance = self._importance.get(base)
        for first, end in _chunks(target):
            if not writer.wants(first, end):
                continue
            parts = {
                ending: _read_rows(headers[spec.name], *source.span(ending, first, end), files)
                for ending, spec in source.specs.items()
            }
            made, row_errors = converted(source, target, parts, importance, writer.columns)
            writer.put(first, end, made, row_errors)
        yield writer.errors()

    def others(
        self, copies: Mapping[str, bytes], entries: Iterable[FileEntry], out: Path
    ) -> dict[str, bytes]:
        """Return what lies beside the tensors: the configuration says the new format."""
        raw = json.loads(copies["config.json"])
        said = self.config.to_hf()
        kept = {k: v for k, v in raw.items() if k not in FORMAT_KEYS}
        config = kept | {k: said[k] for k in FORMAT_KEYS if k in said}
        made = {k: v for k, v in copies.items() if k != DESCRIPTION}
        made |= {"config.json": _json(config)}
        if self.config.quant_types:
            names = (t.name for specs in self.targets.values() for t in specs)
            made[DESCRIPTION] = _json(describe(names, self.config.quant_types))
        return made | {REPORT: report_of(self.name, self.recipe, entries, out)}


class _Sink:
    """One tensor in a file that is being written, from its first byte to its last."""

    def __init__(self, into: int, held: Held, begin: int, moved: Moved) -> None:
        self.held, self.begin = held, begin
        self._into, self._at, self._crc, self._moved = into, begin, 0, moved

    def put(self, data: memoryview) -> None:
        """Write what follows."""
        self._crc = zlib.crc32(data, self._crc)
        _write_at(self._into, data, self._at)
        self._at += len(data)
        self._moved(len(data))

    def record(self) -> TensorRecord:
        """Return the record of the tensor, all of which was written."""
        if self._at != self.begin + self.held.nbytes:
            raise RuntimeError(f"{self.held.spec.name}: {self._at - self.begin} bytes written")
        spec, part = self.held.spec, self.held.part
        return TensorRecord(
            name=spec.name,
            dtype=spec.dtype,
            shape=part.shape(spec.shape) if part else spec.shape,
            part=(part.dim, part.index, part.count) if part else None,
            begin=self.begin,
            end=self._at,
            crc32=self._crc,
        )


class _Weight:
    """The tensors of one linear layer that a file has, each a part or the whole."""

    def __init__(
        self, base: str, target: Stored, held: list[Held], sinks: Mapping[str, _Sink]
    ) -> None:
        self.base, self.target = base, target
        self.parts = {h.spec.name.removeprefix(f"{base}."): h.part for h in held}
        self.sinks = {e: sinks[f"{base}.{e}"] for e in self.parts}
        self._sums = _Sums()

    def wants(self, first: int, end: int) -> bool:
        """Say whether any tensor has something of these rows."""
        return any(a < b for e in self.parts for a, b in [self._rows(e, first, end)])

    @property
    def columns(self) -> slice:
        """Return those of the weight that are written."""
        part = self.parts.get("weight")
        if part is None or part.dim == 0:
            return slice(None)
        return slice(*part.bounds((self.target.n_out, self.target.n_in)))

    def put(self, first: int, end: int, made: Parts, errors: RowErrors | None) -> None:
        """Write these rows, of each tensor its part; without `errors` no value changed."""
        for ending, part in self.parts.items():
            start = self.target.span(ending, first, end)[0]
            a, b = self._rows(ending, first, end)
            tensor = made[ending][max(a - start, 0) : max(b - start, 0)]
            self.sinks[ending].put(_bytes(_columns(tensor, part)))
        self._count(first, end, errors)

    def errors(self) -> TensorErrors:
        """Return how far the weight is from its source."""
        return self._sums.errors(self.base)

    def _rows(self, ending: str, first: int, end: int) -> tuple[int, int]:
        """Return the rows of a tensor that are both in a chunk and in its part."""
        a, b = self.target.span(ending, first, end)
        part = self.parts[ending]
        if part is None or part.dim != 0:
            return a, b
        begin, stop = part.bounds(self.target.specs[ending].shape)
        return max(a, begin), min(b, stop)

    def _count(self, first: int, end: int, errors: RowErrors | None) -> None:
        if "weight" not in self.parts:
            return
        a, b = first, end
        part = self.parts["weight"]
        if part is not None and part.dim == 0:
            begin, stop = part.bounds((self.target.n_out,))
            a, b = max(a, begin), min(b, stop)
        if a < b:
            begin, stop, _ = self.columns.indices(self.target.n_in)
            n_values = (b - a) * (stop - begin)
            self._sums.add(n_values, errors, slice(a - first, b - first))


@dataclass
class _Sums:
    values: int = 0
    n_compared: int = 0  # of them; the others are known to be what they were
    n_changed: int = 0
    largest: float = 0.0
    of_errors: float = 0.0
    of_values: float = 0.0

    def add(self, n_values: int, errors: RowErrors | None, rows: slice) -> None:
        self.values += n_values
        if errors is None:
            return
        self.n_compared += n_values
        self.n_changed += int(errors.n_changed[rows].sum())
        self.largest = max(self.largest, float(errors.largest[rows].amax()))
        self.of_errors += float(errors.of_errors[rows].sum())
        self.of_values += float(errors.of_values[rows].sum())

    def errors(self, base: str) -> TensorErrors:
        return TensorErrors(
            name=f"{base}.weight",
            values=self.values,
            n_changed=self.n_changed,
            max_error=_shortened(self.largest),
            rms_error=_shortened((self.of_errors / max(self.values, 1)) ** 0.5),
            rms=_shortened((self.of_values / max(self.n_compared, 1)) ** 0.5),
        )


def _shortened(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def _sinks(into: int, file: RankFile, begin: int, moved: Moved) -> dict[str, _Sink]:
    sinks = {}
    for h in file.held:
        sinks[h.spec.name] = _Sink(into, h, begin, moved)
        begin += h.nbytes
    return sinks


def _by_base(tensors: Iterable[T]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for t in tensors:
        found.setdefault(base_of(t.name), []).append(t)
    return found


def _chunks(target: Stored) -> Iterator[tuple[int, int]]:
    """Cut the rows of a weight into blocks that every format can be made of."""
    rows = max(1, CHUNK_VALUES // max(1, target.n_in) // BLOCK) * BLOCK
    for first in range(0, target.n_out, rows):
        yield first, min(first + rows, target.n_out)


def _columns(x: torch.Tensor, part: Part | None) -> torch.Tensor:
    if part is None or part.dim == 0:
        return x
    first, end = part.bounds(tuple(x.shape))
    return x[:, first:end]


def _read_rows(header: TensorHeader, first: int, end: int, files: OpenFiles) -> torch.Tensor:
    row = header.nbytes // max(1, header.shape[0])
    data = torch.empty((end - first) * row, dtype=torch.uint8)
    read_into(files.open(header.file), header, header.begin + first * row, data.numpy().data)
    return data.view(TORCH_DTYPES[header.dtype]).view(end - first, *header.shape[1:])


def _copy(header: TensorHeader, part: Part | None, sink: _Sink, files: OpenFiles) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for begin, size in pieces(header, part):
        for at in range(begin, begin + size, CHUNK):
            chunk = buffer[: min(CHUNK, begin + size - at)]
            read_into(files.open(header.file), header, at, chunk)
            sink.put(chunk)


def _bytes(x: torch.Tensor) -> memoryview:
    return x.contiguous().view(torch.uint8).numpy().data.cast("B")


def _write_at(fd: int, data: memoryview, at: int) -> None:
    while data:
        n = os.pwrite(fd, data, at)
        data, at = data[n:], at + n


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_calibration(
    file: Path, linears: Mapping[str, list[TensorHeader]]
) -> dict[str, torch.Tensor]:
    """Read the mean square of each input channel of linear layers, fp32 [n_in] by their names."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as e:
        raise ConfigError(str(file), f"cannot be read as safetensors: {e}") from e
    for name, x in found.items():
        if name not in linears:
            raise ConfigError(str(file), f"{name} is no linear layer of the checkpoint")
        n_in = Stored.of(linears[name]).n_in
        if x.shape != (n_in,) or not bool((x.isfinite() & (x >= 0)).all()):
            raise ConfigError(
                str(file), f"{name}: must be {n_in} numbers of 0 or more, got {list(x.shape)}"
            )
    return {name: x.float() for name, x in found.items()}
