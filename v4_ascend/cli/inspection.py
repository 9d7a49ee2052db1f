"""What `inspect` says of a checkpoint, as data and as text."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from v4_ascend.checkpoint.inspection import Inspection
from v4_ascend.config.model import SUPPORTED, ModelConfig

MAX_PRINTED = 20  # problems


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
    return f"{config.quantization or config.dtype}, experts {config.expert_dtype or config.dtype}"


def _layers(config: ModelConfig) -> dict[str, int]:
    kinds = [config.kind(n) for n in range(config.n_layers)]
    return {kind: kinds.count(kind) for kind in ("swa", "csa", "hca")}


def print_inspection(checkpoint: Path, config: ModelConfig, report: Inspection) -> None:
    """Print a table and what is wrong."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{checkpoint}: DeepSeek-V4, {_formats(config)}", style="bold")
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
    for problem in report.problems[:MAX_PRINTED]:
        console.print(problem, style="red")
    if (more := len(report.problems) - MAX_PRINTED) > 0:
        console.print(f"... and {more:,} more; --json has them all", style="red")
    if not report.problems:
        console.print("complete: every tensor is there, none is unexpected")
