"""`inspect` and `init`."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.errors import ConfigError, V4AscendError


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
    checkpoint: Annotated[
        str, typer.Argument(help="folder of a checkpoint or of shard, or hf:org/name@revision")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="read everything: checksums, and values")
    ] = False,
    diff: Annotated[
        str | None, typer.Option("--diff", help="another checkpoint: what differs, by tensor")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Say what a checkpoint is, from headers alone; exit 1 if it is not what its config says.

    With --verify or --diff, everything is read; exit 1 on damage or a difference.
    """
    if verify and diff is not None:
        raise ConfigError("inspect", "give either --verify or --diff")
    try:
        data, problems, told = _inspected(checkpoint, verify, diff)
    except V4AscendError as e:
        if not as_json:
            raise
        _echo_json(None, (str(e),))
        raise typer.Exit(e.exit_code) from e
    if as_json:
        _echo_json(data, problems)
    else:
        told()
    raise typer.Exit(1 if problems else 0)


def _inspected(
    reference: str, verify: bool, diff: str | None
) -> tuple[dict[str, object], tuple[str, ...], Callable[[], None]]:
    """Return data and problems, and what prints both."""
    from v4_ascend.checkpoint.folder import CheckpointFolder
    from v4_ascend.checkpoint.sharded import ShardedFolder, open_folder
    from v4_ascend.checkpoint.sources import headers, whole
    from v4_ascend.cli import inspection
    from v4_ascend.cli.progress import reporter

    if diff is not None:
        a, b = CheckpointFolder(whole(reference)), CheckpointFolder(whole(diff))
        return inspection.compared(a, b)
    if verify:
        found = open_folder(whole(reference))
        if isinstance(found, ShardedFolder):
            return inspection.of_sharded(found, verify=True)
        return inspection.of_checkpoint(found, reference, verify=True)
    with reporter("fetching headers") as progress, headers(reference, progress) as folder:
        found = open_folder(folder)
        if isinstance(found, ShardedFolder):
            return inspection.of_sharded(found, verify=False)
        return inspection.of_checkpoint(found, reference, verify=False)


def _echo_json(data: dict[str, object] | None, problems: tuple[str, ...]) -> None:
    status = "error" if problems else "ok"
    out = {"version": 1, "status": status, "data": data, "diagnostics": problems}
    typer.echo(json.dumps(out, indent=2))


def init_command(
    out: Annotated[Path, typer.Option("--out", help="new folder")],
    preset: Annotated[str | None, typer.Option(help="tiny, ascend-slice, wide, ...")] = None,
    config: Annotated[Path | None, typer.Option(help="a config.json instead of a preset")] = None,
    seed: Annotated[int, typer.Option(help="of the random values")] = 0,
    format: Annotated[Format, typer.Option("--format", help="of the weights")] = Format.fp8,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="true names and sizes, holes for data")
    ] = False,
) -> None:
    """Write a synthetic checkpoint: random values, official names, dtypes and shards."""
    from v4_ascend.cli.progress import reporter
    from v4_ascend.config.model import ModelConfig
    from v4_ascend.config.presets import preset_path

    if (preset is None) == (config is None):
        raise ConfigError("init", "give either --preset or --config")
    path = config if config is not None else preset_path(preset or "")
    if sparse:
        from v4_ascend.checkpoint.sparse import write_sparse

        if format is not Format.fp8:
            raise ConfigError("--sparse", "writes the format of the configuration alone")
        write_sparse(ModelConfig.read(path), out)
        typer.echo(f"{out}: sparse {path.stem} checkpoint, every value is zero")
        return
    from v4_ascend.checkpoint.synthetic import in_format, write_synthetic

    model = in_format(ModelConfig.read(path), format.value)
    with reporter("writing shards") as progress:
        write_synthetic(model, out, seed=seed, progress=progress)
    typer.echo(f"{out}: synthetic {path.stem} checkpoint, {format.value}, seed {seed}")
