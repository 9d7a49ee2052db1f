"""`bench ops`: every operator beside its floor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4_ascend.errors import ConfigError

if TYPE_CHECKING:
    from v4_ascend.backends import Backend
    from v4_ascend.config.model import ModelConfig
    from v4_ascend.runtime.workload import Workload

WORK = ("decode:1:8192", "decode:32:8192", "prefill:2048:0")


def ops_command(
    model: Annotated[str, typer.Option(help="a preset, or a config.json: whose widths")] = "flash",
    work: Annotated[
        list[str] | None,
        typer.Option(help="decode:BATCH:CONTEXT or prefill:TOKENS:CONTEXT; may be repeated"),
    ] = None,
    backend: Annotated[str, typer.Option(help="whose kernels run")] = "cpu",
    op: Annotated[str | None, typer.Option("--op", help="one operator")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Time each operator of one step against the least its bytes or products take."""
    from v4_ascend.ops import OPS
    from v4_ascend.runtime.bench_ops import bench_ops, machine, measure_rates, packed_records

    if op is not None and op not in OPS:
        raise ConfigError("--op", f"no operator {op!r}; there is {', '.join(OPS)}")
    config, chosen, steps = asked(model, backend, work or WORK)
    records = packed_records(config)
    rates = measure_rates(chosen.device())
    tables = {
        text: list(bench_ops(chosen, config, step, rates, records=records, only=op))
        for text, step in steps.items()
    }
    facts = machine(chosen)
    if as_json:
        data = {
            "what": "ops",
            "model": model,
            "records": records,
            "machine": facts,
            "rates": asdict(rates),
            "work": {text: [asdict(t) for t in rows] for text, rows in tables.items()},
        }
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    rate = ", ".join(f"{unit} {r / 1e12:,.3g} TFLOP/s" for unit, r in rates.products.items())
    typer.echo(f"{model} on {facts['device']}: copy {rates.copy / 1e9:,.0f} GB/s, {rate}")
    for text, rows in tables.items():
        typer.echo(f"\n| {text} | kernel | us | floor us | of floor |\n|---|---|---|---|---|")
        for t in rows:
            name = f"{t.op} {t.what}".strip()
            if t.why:
                typer.echo(f"| {name} | refused: {t.why} | | {t.floor * 1e6:,.1f} | |")
                continue
            how = "" if t.how == "graph" or backend == "cpu" else f" ({t.how})"
            typer.echo(
                f"| {name} | {t.kernel}{how} | {t.seconds * 1e6:,.1f} | {t.floor * 1e6:,.1f} "
                f"| {t.floor / t.seconds:.0%} |"
            )


def asked(
    model: str, backend: str, work: Sequence[str]
) -> tuple[ModelConfig, Backend, dict[str, Workload]]:
    """Return what is to be timed: whose widths, where, and which steps by their names.

    Raises:
        ConfigError: neither a preset nor a file, no workload, or a backend that is not timed.
        BackendUnavailableError: it does not run here.
    """
    from v4_ascend.backends import find_backend
    from v4_ascend.config.model import ModelConfig
    from v4_ascend.config.presets import preset_names, preset_path
    from v4_ascend.runtime.bench_ops import COLD_BYTES
    from v4_ascend.runtime.workload import Workload

    path = preset_path(model) if model in preset_names() else Path(model)
    if not path.is_file():
        names = ", ".join(preset_names())
        raise ConfigError("--model", f"{model!r} is neither a preset ({names}) nor a file")
    try:
        steps = {text: Workload.parse(text) for text in work}
    except ValueError as e:
        raise ConfigError("--work", str(e)) from e
    chosen = find_backend(backend)
    chosen.require()
    if chosen.device() not in COLD_BYTES:
        raise ConfigError(
            "--backend", f"{backend!r}: only {' and '.join(COLD_BYTES)} are timed yet"
        )
    return ModelConfig.read(path), chosen, steps
