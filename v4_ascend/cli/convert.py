"""`convert`."""

from __future__ import annotations

import json
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from v4_ascend.checkpoint.report import Report

NO_LOSS = "lossless: every value is what it was"


class Format(StrEnum):
    """What a checkpoint can be converted to."""

    mxfp4 = "mxfp4"
    fp8 = "fp8"
    mxfp8 = "mxfp8"
    bf16 = "bf16"
    w8a8 = "w8a8"
    w4a8 = "w4a8"


class Soc(StrEnum):
    """Chips with published recipes."""

    a2 = "a2"
    a3 = "a3"
    a5 = "950"


SocOption = Annotated[Soc | None, typer.Option("--soc", help="chip whose recipe is taken")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="a recipe of configs/precision.yaml by its name")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="safetensors: mean square of each input channel, by linear layer"),
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("convert")(convert_command)


def convert_command(
    checkpoint: Annotated[str, typer.Argument(help="folder, or hf:org/name@revision")],
    to: Annotated[Format, typer.Option("--to", help="format of the weights")],
    out: Annotated[Path, typer.Option("--out", help="new folder")],
    soc: SocOption = None,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with --out: keep what is whole")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="files at once; default: the cores, 8 at most")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Convert a checkpoint's weights to another format, and say what that did to the values."""
    from v4_ascend.checkpoint.convert import Conversion
    from v4_ascend.checkpoint.folder import CheckpointFolder
    from v4_ascend.checkpoint.recoding import Recoding
    from v4_ascend.checkpoint.report import read_report
    from v4_ascend.checkpoint.sources import headers, whole
    from v4_ascend.cli.progress import byte_reporter, reporter
    from v4_ascend.config.precision import recipe_for
    from v4_ascend.config.topology import is_remote

    chosen = recipe_for(to.value, soc.value if soc else None, recipe)

    def job_of(path: Path) -> Conversion:
        folder = CheckpointFolder(path)
        folder.require_complete()
        return Conversion(folder, Recoding(folder, to.value, chosen, calibration))

    if is_remote(checkpoint):  # what cannot work is refused before hundreds of GB are fetched
        with reporter("fetching headers") as progress, headers(checkpoint, progress) as sketch:
            job_of(sketch).require_space(out)
    job = job_of(whole(checkpoint))
    slower = slower_because()
    begun = time.perf_counter()
    with byte_reporter("converting") as progress:
        n_workers = workers or min(8, os.cpu_count() or 1)
        done = job.run(out, resume=resume, workers=n_workers, progress=progress)
    seconds = time.perf_counter() - begun
    report = read_report(out)
    if as_json:
        import msgspec

        data = {
            "out": str(out),
            "format": to.value,
            "source": done.manifest.source.digest,
            "lossless": report.is_lossless,
            "places": msgspec.to_builtins(report.places),
            "files": len(done.manifest.files),
            "files_kept": done.n_kept,
            "bytes_written": done.bytes_written,
            "seconds": round(seconds, 3),
        }
        result = {"version": 1, "status": "ok", "data": data, "diagnostics": slower}
        typer.echo(json.dumps(result, indent=2))
        return
    print_report(report)
    kept = f", {done.n_kept} were there and whole" if done.n_kept else ""
    typer.echo(
        f"{out}: {to.value}, {len(done.manifest.files)} files{kept}; {done.bytes_written:,} bytes "
        f"written in {seconds:.1f} s"
    )


def slower_because() -> list[str]:
    """Say, and return, why rows are converted by plain torch; nothing where C++ does it."""
    from v4_ascend.checkpoint.compiled import MISSING

    if MISSING is None:
        return []
    why = f"{MISSING}; plain torch converts, to the same bytes and more slowly"
    typer.echo(f"warning: {why}", err=True)
    return [why]


def print_report(report: Report) -> None:
    """Print what a conversion did to the values, by kind of layer."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if report.recipe:
        console.print(f"recipe {report.recipe}: {report.source_of_recipe}")
    if report.places:
        table = Table("converted", "weights", "values", "changed", "largest error", "RMS error")
        for p in report.places:
            changed = f"{p.n_changed / p.values:.2%}" if p.values else "-"
            numbers = (f"{p.max_error:.3g}", f"{p.relative:.3%}") if p.n_changed else ("0", "0")
            table.add_row(p.place, f"{p.weights:,}", f"{p.values:,}", changed, *numbers)
        console.print(table)
    if not report.places:
        console.print(f"{NO_LOSS}, bit for bit: the checkpoint has this format already")
    elif report.is_lossless:
        console.print(NO_LOSS)
    else:
        n = sum(w.n_changed > 0 for w in report.weights)
        console.print(f"{n:,} of {len(report.weights):,} converted weights changed values")
