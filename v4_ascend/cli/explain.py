"""`explain-error`: what failed first, where, why, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("explain-error")(explain_command)


def explain_command(
    what: Annotated[
        list[str] | None, typer.Argument(help="logs, folders of logs, - for stdin, or one code")
    ] = None,
    name: Annotated[str | None, typer.Option(help="the logs and plan of a deployment")] = None,
    plan: Annotated[Path | None, typer.Option(help="plan.json, to say what a rank holds")] = None,
    list_: Annotated[bool, typer.Option("--list", help="print all known errors")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Find the first error in logs and explain it, or explain a code.

    Exits with 0 if it is explained, 1 if nothing known was found, 2 if a file is not there.
    """
    from v4_ascend.deploy.explain.logs import look_through, looks_like_code, of_deployment
    from v4_ascend.deploy.explain.report import verdict_facts, verdict_lines
    from v4_ascend.supernode.plan import Plan

    words = list(what or ())
    if list_:
        _list(as_json)
        return
    if len(words) == 1 and not Path(words[0]).exists() and words[0] != "-":
        from v4_ascend.deploy.explain.entries import find

        if find(words[0]) or looks_like_code(words[0]):
            _code(words[0], as_json)
            return
    if not words and name is None:
        raise ConfigError(
            "explain-error", "nothing to explain; give logs, a code, --name or --list"
        )
    known = Plan.read(plan) if plan is not None else None
    logs: list[str | Path] = list(words)
    if name is not None:
        files, own = of_deployment(name)
        logs += files
        known = known or own
    from v4_ascend.deploy.explain.findings import judge

    findings = look_through(logs, known)
    verdict = judge(findings.sorted())
    untimed = findings.files_without_time
    is_explained = verdict.first is not None and verdict.first.entry is not None
    if as_json:
        _echo_json(verdict_facts(verdict, known, untimed), ok=is_explained)
    else:
        for line in verdict_lines(verdict, known, untimed):
            typer.echo(line)
    if not is_explained:
        raise typer.Exit(1)


def _code(code: str, as_json: bool) -> None:
    from v4_ascend.deploy.explain.entries import find
    from v4_ascend.deploy.explain.report import entry_facts, entry_lines

    entry = find(code)
    if as_json:
        _echo_json(entry and entry_facts(entry), ok=entry is not None)
    elif entry is None:
        typer.echo(
            f"{code}: unknown, and no file; v4-ascend explain-error --list prints what is known"
        )
    else:
        for line in entry_lines(entry):
            typer.echo(line)
    if entry is None:
        raise typer.Exit(1)


def _list(as_json: bool) -> None:
    from v4_ascend.deploy.explain.entries import all_entries
    from v4_ascend.deploy.explain.report import entry_facts

    if as_json:
        _echo_json([entry_facts(e) for e in all_entries()], ok=True)
        return
    for e in all_entries():
        typer.echo(f"{e.id:24} {e.layer:12} {e.title}")


def _echo_json(data: object, *, ok: bool) -> None:
    out = {"version": 1, "status": "ok" if ok else "error", "data": data, "diagnostics": []}
    typer.echo(json.dumps(out, indent=2))
