"""What a conversion did to the values: each weight's error, and sums by kind of layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from v4_ascend.checkpoint.manifest import FileEntry, TensorErrors, read_record
from v4_ascend.config.precision import Recipe
from v4_ascend.config.quant_types import base_of, place_of

REPORT = "conversion.json"


class PlaceErrors(msgspec.Struct, frozen=True, kw_only=True):
    """All converted weights of one place in the layers; `relative` is RMS of errors by RMS."""

    place: str
    weights: int
    values: int
    n_changed: int
    max_error: float
    relative: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`conversion.json`."""

    format: str
    recipe: str | None
    source_of_recipe: str | None
    is_lossless: bool
    places: tuple[PlaceErrors, ...]
    weights: tuple[TensorErrors, ...]


def report_of(format: str, recipe: Recipe | None, entries: Iterable[FileEntry], out: Path) -> bytes:
    """Return the report of a folder from its files' records."""
    weights = [e for entry in entries for e in read_record(out / entry.name).errors]
    by_place: dict[str, list[TensorErrors]] = {}
    for w in weights:
        by_place.setdefault(place_of(base_of(w.name)), []).append(w)
    report = Report(
        format=format,
        recipe=recipe.name if recipe else None,
        source_of_recipe=recipe.source if recipe else None,
        is_lossless=not any(w.n_changed for w in weights),
        places=tuple(_summed(place, of) for place, of in sorted(by_place.items())),
        weights=tuple(weights),
    )
    return msgspec.json.format(msgspec.json.encode(report)) + b"\n"


def read_report(folder: Path) -> Report:
    """Read the report of a folder that `convert` has written."""
    return msgspec.json.decode((folder / REPORT).read_bytes(), type=Report)


def _summed(place: str, weights: list[TensorErrors]) -> PlaceErrors:
    squares = sum(w.values * w.rms**2 for w in weights)
    errors = sum(w.values * w.rms_error**2 for w in weights)
    return PlaceErrors(
        place=place,
        weights=len(weights),
        values=sum(w.values for w in weights),
        n_changed=sum(w.n_changed for w in weights),
        max_error=max(w.max_error for w in weights),
        relative=float(f"{(errors / squares) ** 0.5 if squares else 0.0:.6g}"),
    )
