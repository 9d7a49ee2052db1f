"""`bench layer`: a whole layer beside the sum of its operators' floors."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

WORK = ("decode:32:8192",)


def layer_command(
    experts: Annotated[int, typer.Option(min=1, help="routed experts on this device")],
    model: Annotated[str, typer.Option(help="a preset, or a config.json: whose widths")] = "flash",
    work: Annotated[
        list[str] | None, typer.Option(help="decode:BATCH:CONTEXT; may be repeated")
    ] = None,
    backend: Annotated[str, typer.Option(help="whose kernels run")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Time a decode step of one CSA and one HCA layer, with random weights of a model's widths."""
    from v4_ascend.cli.bench_ops import asked
    from v4_ascend.runtime.bench_layer import bench_layer
    from v4_ascend.runtime.bench_ops import machine, measure_rates, packed_records

    config, chosen, steps = asked(model, backend, work or WORK)
    rates, records = measure_rates(chosen.device()), packed_records(config)
    tables = {
        text: list(bench_layer(chosen, config, step, rates, n_experts=experts, records=records))
        for text, step in steps.items()
    }
    facts = machine(chosen)
    if as_json:
        data = {
            "what": "layer",
            "model": model,
            "experts": experts,
            "records": records,
            "machine": facts,
            "rates": asdict(rates),
            "work": {text: [asdict(t) for t in rows] for text, rows in tables.items()},
        }
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    typer.echo(f"{model} with {experts} experts on {facts['device']}\n")
    typer.echo("| work | layer | operators | us | sum of floors | times it |")
    typer.echo("|---|---|---|---|---|---|")
    for text, rows in tables.items():
        for t in rows:
            typer.echo(
                f"| {text} | {t.kind} | {t.n_calls} | {t.seconds * 1e6:,.0f} "
                f"| {t.floor * 1e6:,.0f} | {t.seconds / t.floor:.2f} |"
            )
