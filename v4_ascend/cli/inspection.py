"""What `inspect` says of a checkpoint, as data and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from rich.console import Console
from rich.table import Table

from v4_ascend.checkpoint.damage import checkpoint_damage
from v4_ascend.checkpoint.difference import common_bytes, differences
from v4_ascend.checkpoint.folder import MANIFEST, CheckpointFolder
from v4_ascend.checkpoint.inspection import Inspection
from v4_ascend.checkpoint.sharded import ShardedFolder
from v4_ascend.cli.progress import byte_reporter
from v4_ascend.config.model import SUPPORTED, ModelConfig
from v4_ascend.errors import CheckpointError

MAX_PRINTED = 20  # problems
# Data for scripts, problems, and what prints both for people.
Inspected = tuple[dict[str, object], tuple[str, ...], Callable[[], None]]


def of_checkpoint(found: CheckpointFolder, reference: str, *, verify: bool) -> Inspected:
    """Inspect a checkpoint, known by its reference; with `verify`, read its values too."""
    config, report = found.config, found.check()
    damaged: tuple[str, ...] = ()
    if verify and (found.path / MANIFEST).exists():  # of `convert`: it has checksums
        damaged = _read_all("verifying", report.nbytes, ShardedFolder(found.path).damage)
    elif verify:
        headers = list(found.headers.values())
        damaged = _read_all(
            "verifying", report.nbytes, lambda moved: checkpoint_damage(headers, moved)
        )

    def tell() -> None:
        print_inspection(reference, config, report)
        if verify:
            _print_problems(damaged, "verified: every value is a number, every scale above zero")

    return facts(config, report) | {"verified": verify}, (*report.problems, *damaged), tell


def of_sharded(found: ShardedFolder, *, verify: bool) -> Inspected:
    """Inspect what `shard` made; with `verify`, compare every checksum."""
    m = found.manifest
    data: dict[str, object] = {
        "formats": _formats(found.config),
        "source": msgspec.to_builtins(m.source),
        "plan": m.plan,
        "layout": m.layout,
        "ranks": m.n_ranks,
        "files": len(m.files),
        "bytes": found.nbytes,
        "verified": verify,
    }
    problems = _read_all("verifying", found.nbytes, found.damage) if verify else found.check()

    def tell() -> None:
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(f"{found.path}: DeepSeek-V4, {_formats(found.config)}", style="bold")
        console.print(f"laid out for {m.n_ranks} ranks, layout {m.layout}")
        revision = f" at {m.source.revision}" if m.source.revision else ""
        console.print(f"from {m.source.path}{revision}, digest {m.source.digest}")
        console.print(f"{len(m.files):,} files, {found.nbytes:,} bytes")
        fine = "verified: every checksum is the recorded one" if verify else "every file is there"
        _print_problems(problems, fine)

    return data, problems, tell


def compared(a: CheckpointFolder, b: CheckpointFolder) -> Inspected:
    """Compare two checkpoints, every byte."""
    total = common_bytes(a, b)
    found = _read_all("comparing", total, lambda moved: differences(a, b, moved))
    data: dict[str, object] = {
        "checkpoints": [str(a.path), str(b.path)],
        "bytes_compared": total,
        "differences": len(found),
    }
    return data, found, lambda: _print_problems(found, f"no difference in {total:,} bytes")


def _read_all(
    what: str, total: int, look: Callable[[Callable[[int], None]], Iterable[str]]
) -> tuple[str, ...]:
    """Collect problems under a progress bar."""
    done = 0
    with byte_reporter(what) as progress:

        def moved(n: int) -> None:
            nonlocal done
            done += n
            progress(done, total)

        try:
            return tuple(look(moved))
        except OSError as e:
            raise CheckpointError(f"{e.filename}: cannot be read: {e.strerror}") from e


def _print_problems(problems: tuple[str, ...], fine: str) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for problem in problems[:MAX_PRINTED]:
        console.print(problem, style="red")
    if (more := len(problems) - MAX_PRINTED) > 0:
        console.print(f"... and {more:,} more; --json has them all", style="red")
    if not problems:
        console.print(fine)


def facts(config: ModelConfig, report: Inspection) -> dict[str, object]:
    """Return what `inspect --json` reports as data."""
    return {
        "model_type": SUPPORTED,
        "formats": _formats(config),
        "layers": _layers(config),
        "mtp_layers": config.n_mtp_layers,
        "drafter": "dspark" if config.dspark else None,
        "tensors": report.n_tensors,
        "bytes": report.nbytes,
        "tensors_by_dtype": report.tensors_by_dtype,
        "bytes_by_dtype": report.bytes_by_dtype,
        "missing": report.missing,
        "unexpected": report.unexpected,
        "unknown_config_keys": config.unknown_keys,
    }


def _formats(config: ModelConfig) -> str:
    if config.quant_types:
        kinds = dict(config.quant_types)
        rest = sorted({k for place, k in kinds.items() if place != "ffn.experts"})
        experts = kinds.get("ffn.experts", config.dtype)
        return f"{config.dtype} with {' and '.join(rest)}, experts {experts}"
    return f"{config.quantization or config.dtype}, experts {config.expert_dtype or config.dtype}"


def _layers(config: ModelConfig) -> dict[str, int]:
    kinds = [config.kind(n) for n in range(config.n_layers)]
    return {kind: kinds.count(kind) for kind in ("swa", "csa", "hca")}


def print_inspection(reference: str, config: ModelConfig, report: Inspection) -> None:
    """Print a table and what is wrong."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{reference}: DeepSeek-V4, {_formats(config)}", style="bold")
    kinds = ", ".join(f"{n} {kind.upper()}" for kind, n in _layers(config).items() if n)
    extra = "DSpark drafter" if config.dspark else f"{config.n_mtp_layers} MTP"
    console.print(f"layers: {kinds}, {extra}")
    table = Table("dtype", "tensors", "bytes")
    for dtype, n in report.tensors_by_dtype.items():
        table.add_row(dtype, f"{n:,}", f"{report.bytes_by_dtype[dtype]:,}")
    table.add_row("all", f"{report.n_tensors:,}", f"{report.nbytes:,}")
    console.print(table)
    for key in config.unknown_keys:
        console.print(f"note: config.json has {key!r}, which V4 does not know; it is ignored")
    _print_problems(report.problems, "complete: every tensor is there, none is unexpected")
