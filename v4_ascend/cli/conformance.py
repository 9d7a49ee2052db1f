"""`conformance`: the cases of an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("conformance")(conformance_command)


def conformance_command(
    url: Annotated[str, typer.Argument(help="such as http://127.0.0.1:8000")],
    model: Annotated[str | None, typer.Option(help="default: the only one there")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="V4_ASCEND_API_KEY", help="sent as a bearer token")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Try what agents rely on: streams, tool calls, reasoning, errors; exit 1 if a case fails."""
    from v4_ascend.cli.console import new_console
    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.conformance.run import require_all_passed, run_cases

    with reporter("running cases") as progress:
        outcomes = run_cases(url, model, api_key, progress)
    if as_json:
        failed = [f"{o.case}: {o.detail}" for o in outcomes if o.status == "failed"]
        data = {"url": url, "cases": [asdict(o) for o in outcomes]}
        status = "error" if failed else "ok"
        typer.echo(
            json.dumps({"version": 1, "status": status, "data": data, "diagnostics": failed})
        )
    else:
        from rich.table import Table

        table = Table("case", "", "s", "what was found")
        for o in outcomes:
            table.add_row(o.case, o.status, f"{o.seconds:.1f}", o.detail)
        new_console().print(table)
    require_all_passed(outcomes)
