"""`bench context`: a decoded token's time against the context behind it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

CONTEXTS = (1024, 16_384, 131_072, 1_048_576)


def context_command(
    checkpoint: Annotated[Path, typer.Option(help="checkpoint folder")],
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="tokens behind the decoded one; may be repeated"),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="sequences that decode; may be repeated")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="timed at each; the median counts")] = 9,
    backend: Annotated[str, typer.Option(help="whose kernels run")] = "cpu",
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="an SVG of it, written here")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Time a decoded token behind long contexts, beside the least it could take.

    Caches are filled with seeded rows. What would need more than half of the memory is left out,
    and said.
    """
    from v4_ascend.backends import find_backend
    from v4_ascend.checkpoint.manifest import write_whole
    from v4_ascend.checkpoint.reader import Checkpoint
    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.bench_context import bench_context
    from v4_ascend.runtime.bench_ops import machine, measure_rates
    from v4_ascend.runtime.context_plot import plot

    found = find_backend(backend)
    found.require()
    found.use_chip(None)
    rates, opened = measure_rates(found.device()), Checkpoint(checkpoint)
    with reporter("timing batches") as progress:
        points = list(
            bench_context(
                opened,
                found,
                rates,
                contexts=context or CONTEXTS,
                batches=batch or (1,),
                n_steps=steps,
                progress=progress,
            )
        )
    facts = machine(found)
    if plot_file is not None and any(not p.why for p in points):
        picture = plot(points, f"a decoded token, {facts['device']}")
        write_whole(plot_file, picture.encode())
    if as_json:
        data = {"what": "context", "machine": facts, "rates": asdict(rates),
                "points": [asdict(p) for p in points]}  # fmt: skip
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    typer.echo(f"{facts['device']}: copy {rates.copy / 1e9:,.1f} GB/s")
    typer.echo(
        "| batch | context | ms a step | tokens/s | floor ms | of floor | weights MB | caches MB "
        "| GFLOP |\n|---|---|---|---|---|---|---|---|---|"
    )
    for p in points:
        read = (
            f"{p.weight_bytes / 1e6:,.1f} | {p.cache_bytes / 1e6:,.2f} | {p.operations / 1e9:,.2f}"
        )
        if p.why:
            time = f"not run: {p.why} | | {p.floor * 1e3:,.2f} | "
        else:
            time = f"{p.seconds * 1e3:,.2f} | {p.batch / p.seconds:,.1f} | {p.floor * 1e3:,.2f} | "
            time += f"{p.floor / p.seconds:.0%}"
        typer.echo(f"| {p.batch} | {p.context:,} | {time} | {read} |")
