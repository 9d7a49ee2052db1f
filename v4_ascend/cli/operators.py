"""`ops` and `verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.cli.emulate import emulate_npu
from v4_ascend.errors import ConfigError, ParityError


class Shapes(StrEnum):
    """Whose widths."""

    tiny = "tiny"
    flash = "flash"
    pro = "pro"


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("ops")(ops_command)
    app.command("verify")(verify_command)


def ops_command(
    backend: Annotated[str | None, typer.Option(help="one backend, with every reason")] = None,
    soc: Annotated[str | None, typer.Option(help="a chip, such as 950dt; with --backend")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Say which kernel would run every operator at Flash and Pro shapes, or why none would."""
    from v4_ascend.backends import BACKENDS, find_backend
    from v4_ascend.cli.operator_tables import print_backend, print_overview
    from v4_ascend.runtime.capability import Probes, capabilities

    if soc is not None and backend is None:
        raise ConfigError("--soc", "needs --backend, whose chip it is")
    probes = Probes()
    found = []
    for b in BACKENDS.values() if backend is None else [find_backend(backend)]:
        for chip in [soc] if soc is not None else b.chips or (None,):
            found.append((b, chip, capabilities(b, chip, probes)))
    if as_json:
        data = [
            {
                "backend": b.name,
                "soc": chip,
                "unavailable": b.why_unavailable(),
                "ops": [asdict(c) for c in table],
            }
            for b, chip, table in found
        ]
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
    elif backend is None:
        print_overview(found)
    else:
        for b, chip, table in found:
            print_backend(b, chip, table)


def verify_command(
    backend: Annotated[str | None, typer.Option(help="default: all that run here")] = None,
    op: Annotated[str | None, typer.Option("--op", help="one operator")] = None,
    case: Annotated[str | None, typer.Option(help="part of the cases' names")] = None,
    shapes: Annotated[Shapes, typer.Option(help="whose widths")] = Shapes.tiny,
    soc: Annotated[str | None, typer.Option(help="a chip; default: the one here")] = None,
    emulate: Annotated[bool, typer.Option("--emulate", help="an NPU in host memory")] = False,
    report: Annotated[Path | None, typer.Option(help="folder for HTML, JSON and JUnit")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Run every kernel against its reference on this machine; exit 5 if one differs."""
    if emulate:
        emulate_npu(backend or "", soc)
    from v4_ascend.backends import BACKENDS, find_backend
    from v4_ascend.cli.files import require_writable
    from v4_ascend.cli.operator_tables import print_results
    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.verify import Selection, verify
    from v4_ascend.runtime.verify_report import facts, write_report

    if report is not None:
        require_writable("--report", report, make=True)
    if backend is None:
        chosen = [b for b in BACKENDS.values() if b.why_unavailable() is None]
    else:
        chosen = [find_backend(backend)]
        chosen[0].require()
    selection = Selection(op, case, shapes.value)
    results = {}
    for b in chosen:
        b.use_chip(soc)
        with reporter(f"verifying {b.name}") as progress:
            results[b.name] = list(verify(b, selection, progress))
    summary = facts(results, selection)
    if report is not None:
        write_report(report, summary)
    failures = [f"{r['op']} {r['kernel']} {r['case']}: {r['why']}" for r in summary["failed"]]
    if as_json:
        status = "error" if failures else "ok"
        envelope = {"version": 1, "status": status, "data": summary, "diagnostics": failures}
        typer.echo(json.dumps(envelope))
    else:
        print_results(results)
        if report is not None:
            typer.echo(f"report: {report / 'index.html'}")
    if not any(r.outcome == "passed" for rows in results.values() for r in rows):
        raise ParityError("nothing was verified: every kernel refused every chosen case")
    raise typer.Exit(ParityError.exit_code if failures else 0)
