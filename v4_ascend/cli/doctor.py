"""`doctor`: is every host fit, and if not, what to do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from v4_ascend.deploy.doctor.finding import Finding


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("doctor")(doctor_command)


def doctor_command(
    topology: Annotated[
        str | None, typer.Option(help="all its hosts, the first being this one; default: this host")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value")] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="call every operator once on a device")
    ] = True,
    timeout: Annotated[float, typer.Option(min=1, help="seconds a host may take")] = 120.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="list what is well too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Check every host before anything is started; exit 4 with the cause if one is not fit."""
    from v4_ascend.config.topology import load_topology
    from v4_ascend.deploy.doctor.facts import Question
    from v4_ascend.deploy.doctor.finding import Expected
    from v4_ascend.deploy.doctor.pings import with_pings
    from v4_ascend.deploy.doctor.preflight import (
        HERE,
        ask_all,
        expected_of,
        judge,
        questions_of,
    )
    from v4_ascend.errors import PreflightError

    if topology is not None:
        wanted = load_topology(topology, set_ or [])
        expected = expected_of(wanted)
        questions = questions_of(wanted, expected, timeout, probe=probe)
    else:
        expected = {HERE: Expected()}
        questions = [Question(HERE, timeout_s=timeout, probe="auto" if probe else "")]
    found = judge(with_pings(ask_all(questions), ask_all), expected)
    blockers = [f for f in found if f.level == "blocker"]
    if as_json:
        from msgspec import to_builtins

        lines = [f"{f.host}: {f.what}" for f in blockers]
        status = "error" if blockers else "ok"
        data = {"hosts": [q.host for q in questions], "findings": to_builtins(found)}
        typer.echo(json.dumps({"version": 1, "status": status, "data": data, "diagnostics": lines}))
    else:
        _print(found, len(questions), verbose)
    raise typer.Exit(PreflightError.exit_code if blockers else 0)


def _print(found: list[Finding], n_hosts: int, verbose: bool) -> None:
    """Print the worst first, a line each and its next step; count what is well."""
    from collections import Counter

    styles = {"blocker": typer.colors.RED, "warning": typer.colors.YELLOW}
    quiet = ("ok", "not-applicable")
    for f in found:
        if f.level in quiet and not verbose:
            continue
        mark = typer.style(
            f"{f.level.upper() if f.level == 'blocker' else f.level:14}", fg=styles.get(f.level)
        )
        expected = f"; expected {f.expected}" if f.expected and f.level not in quiet else ""
        typer.echo(f"{mark} {f.host}: {f.what}{expected}  [{f.check}]")
        if f.next_step and f.level not in quiet:
            typer.echo(f"{'':14} next: {f.next_step}")
        if verbose and f.source:
            typer.echo(f"{'':14} source: {f.source}")
    counts = Counter(f.level for f in found)
    hosts = f"{n_hosts} host{'s' if n_hosts > 1 else ''}"
    verdict = "not fit" if counts["blocker"] else "fit"
    typer.echo(
        f"{hosts}, {verdict}: {counts['blocker']} blockers, {counts['warning']} warnings, "
        f"{counts['hint']} hints, {counts['ok']} well"
        + (f", {counts['not-applicable']} not applicable" if counts["not-applicable"] else "")
        + ("" if verbose else "; --verbose lists all")
    )
