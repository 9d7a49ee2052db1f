"""`shard`."""

from __future__ import annotations

import json
import os
import time
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4_ascend.cli.convert import (
    CalibrationOption,
    Format,
    RecipeOption,
    SocOption,
    print_report,
    slower_because,
)
from v4_ascend.errors import ConfigError

if TYPE_CHECKING:
    from v4_ascend.checkpoint.shard import Sharding


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("shard")(shard_command)


def shard_command(
    checkpoint: Annotated[str, typer.Argument(help="folder, or hf:org/name@revision")],
    plan: Annotated[Path, typer.Option("--plan", help="plan.json, as plan --out writes it")],
    out: Annotated[Path, typer.Option("--out", help="new folder")],
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with --out: keep what is whole")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="files at once; default: the cores, 8 at most")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="no copy of a file that goes to one rank as it is")
    ] = False,
    to: Annotated[
        Format | None, typer.Option("--to", help="convert on the way, as convert --to")
    ] = None,
    soc: SocOption = None,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="sizes and space alone, write nothing")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Lay a checkpoint out for a plan: each rank's tensors in its own files, as it reads them."""
    from v4_ascend.checkpoint.folder import CheckpointFolder
    from v4_ascend.checkpoint.shard import Sharding
    from v4_ascend.checkpoint.sources import headers, whole
    from v4_ascend.cli.progress import byte_reporter, reporter
    from v4_ascend.config.topology import is_remote
    from v4_ascend.supernode.plan import Plan

    wanted = Plan.read(plan)

    def job_of(path: Path) -> Sharding:
        folder = CheckpointFolder(path)
        folder.require_complete()
        recoding = None
        if to is not None:
            from v4_ascend.checkpoint.recoding import Recoding
            from v4_ascend.config.precision import recipe_for

            chosen = recipe_for(to.value, soc.value if soc else None, recipe)
            recoding = Recoding(folder, to.value, chosen, calibration)
        return Sharding(folder, wanted, is_linked=link, recoding=recoding)

    if to is not None and link:
        raise ConfigError("--link", "a file that is converted is another file; leave --to away")
    if dry_run or is_remote(checkpoint):
        # Of a hub, headers alone: what cannot work is refused before hundreds of GB are fetched.
        with reporter("fetching headers") as progress, headers(checkpoint, progress) as sketch:
            job = job_of(sketch)
        if dry_run:
            _tell_sizes(job, out, as_json)
            return
        job.require_space(out)
    job = job_of(whole(checkpoint))
    slower = slower_because() if to is not None else []
    begun = time.perf_counter()
    with byte_reporter("sharding") as progress:
        n_workers = workers or min(8, os.cpu_count() or 1)
        done = job.run(out, resume=resume, workers=n_workers, progress=progress)
    seconds = time.perf_counter() - begun
    rate = done.bytes_written / seconds
    if as_json:
        data = {
            "out": str(out),
            "layout": done.manifest.layout,
            "source": done.manifest.source.digest,
            "ranks": done.manifest.n_ranks,
            "files": len(done.manifest.files),
            "files_kept": done.n_kept,
            "bytes_written": done.bytes_written,
            "seconds": round(seconds, 3),
            "bytes_per_s": round(rate),
        }
        _echo_json("ok", data, slower)
        return
    if to is not None:
        from v4_ascend.checkpoint.report import read_report

        print_report(read_report(out))
    kept = f", {done.n_kept} were there and whole" if done.n_kept else ""
    typer.echo(
        f"{out}: {done.manifest.n_ranks} ranks, {len(done.manifest.files)} files{kept}; "
        f"{done.bytes_written:,} bytes written in {seconds:.1f} s, {rate / 1e9:.2f} GB/s"
    )


def _tell_sizes(job: Sharding, out: Path, as_json: bool) -> None:
    """Print what would be written; exit 1 if the disk is too small for it."""
    from rich.console import Console
    from rich.table import Table

    from v4_ascend.checkpoint.writing import bytes_free

    sizes, needed, free = job.bytes_of_ranks(), job.bytes_to_write, bytes_free(out)
    problem = (
        f"{out}: {needed:,} bytes to write, its disk has {free:,} free" if needed > free else None
    )
    if as_json:
        data = {
            "ranks": sizes,
            "files": len(job.files),
            "bytes_in_ranks": sum(sizes),
            "bytes_to_write": needed,
            "bytes_free": free,
        }
        _echo_json("error" if problem else "ok", data, [problem] if problem else [])
    else:
        table = Table("ranks", "bytes each", "bytes")
        for size, same in groupby(enumerate(sizes), key=lambda r: r[1]):
            ranks = [n for n, _ in same]
            name = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            table.add_row(name, f"{size:,}", f"{size * len(ranks):,}")
        table.add_row("all", "", f"{sum(sizes):,}")
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(table)
        console.print(f"{len(job.files):,} files; {needed:,} bytes to write, {free:,} free")
        if problem:
            console.print(problem, style="red")
    raise typer.Exit(1 if problem else 0)


def _echo_json(status: str, data: dict[str, object], problems: list[str]) -> None:
    out = {"version": 1, "status": status, "data": data, "diagnostics": problems}
    typer.echo(json.dumps(out, indent=2))
