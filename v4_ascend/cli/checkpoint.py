"""`inspect` and `init`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.errors import ConfigError


class Format(StrEnum):
    """How `init` stores weights."""

    fp8 = "fp8"
    bf16 = "bf16"
    fp32 = "fp32"


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("inspect")(inspect_command)
    app.command("init")(init_command)


def inspect_command(
    checkpoint: Annotated[Path, typer.Argument(help="folder with config.json and safetensors")],
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Say what a checkpoint is, from headers alone; exit 1 if it is not what its config says."""
    from v4_ascend.checkpoint.reader import Checkpoint

    found = Checkpoint(checkpoint)
    config, report = found.config, found.check()
    formats = (
        f"{config.quantization or config.dtype}, experts {config.expert_dtype or config.dtype}"
    )
    kinds = [config.kind(n) for n in range(config.n_layers)]
    data = {
        "checkpoint": str(checkpoint),
        "model_type": "deepseek_v4",
        "formats": formats,
        "layers": {kind: kinds.count(kind) for kind in ("swa", "csa", "hca")},
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
    status = "error" if report.problems else "ok"
    if as_json:
        out = {"version": 1, "status": status, "data": data, "diagnostics": report.problems}
        typer.echo(json.dumps(out, indent=2))
    else:
        _print(data, report.problems)
    raise typer.Exit(1 if report.problems else 0)


def _print(data: dict[str, object], problems: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    layers = data["layers"]
    assert isinstance(layers, dict)
    console.print(f"[bold]{data['checkpoint']}[/bold]: DeepSeek-V4, {data['formats']}")
    kinds = ", ".join(f"{n} {kind.upper()}" for kind, n in layers.items() if n)
    extra = "DSpark drafter" if data["drafter"] else f"{data['mtp_layers']} MTP"
    console.print(f"layers: {kinds}, {extra}")
    table = Table("dtype", "tensors", "bytes")
    counts, nbytes = data["tensors_by_dtype"], data["bytes_by_dtype"]
    assert isinstance(counts, dict)
    assert isinstance(nbytes, dict)
    for dtype, n in counts.items():
        table.add_row(dtype, f"{n:,}", f"{nbytes[dtype]:,}")
    table.add_row("all", f"{data['tensors']:,}", f"{data['bytes']:,}")
    console.print(table)
    for problem in problems:
        console.print(f"[red]{problem}[/red]", highlight=False)
    for key in data["unknown_config_keys"] or ():  # type: ignore[attr-defined]
        console.print(f"note: config.json has {key!r}, which V4 does not know; it is ignored")
    if not problems:
        console.print("complete: every tensor is there, none is unexpected")


def init_command(
    out: Annotated[Path, typer.Option("--out", help="new folder")],
    preset: Annotated[str | None, typer.Option(help="tiny, ascend-slice, wide, ...")] = None,
    config: Annotated[Path | None, typer.Option(help="a config.json instead of a preset")] = None,
    seed: Annotated[int, typer.Option(help="of the random values")] = 0,
    format: Annotated[Format, typer.Option("--format", help="of the weights")] = Format.fp8,
) -> None:
    """Write a synthetic checkpoint: random values, official names, dtypes and shards."""
    from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
    from v4_ascend.cli.progress import reporter
    from v4_ascend.config.model import ModelConfig
    from v4_ascend.config.presets import preset_path

    if (preset is None) == (config is None):
        raise ConfigError("init", "give either --preset or --config")
    path = config if config is not None else preset_path(preset or "")
    model = in_format(ModelConfig.read(path), format.value)
    with reporter("writing shards") as progress:
        write_synthetic(model, out, seed=seed, progress=progress)
    typer.echo(f"{out}: synthetic {path.stem} checkpoint, {format.value}, seed {seed}")
