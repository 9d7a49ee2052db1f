"""`status`, `logs` and `down`: of what is deployed on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4_ascend.errors import ConfigError, DeadlineError, V4AscendError

if TYPE_CHECKING:
    from v4_ascend.deploy.containers.given import Given
    from v4_ascend.deploy.state import Supervisor


def status_command(
    name: Annotated[str | None, typer.Argument(help="one deployment")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Say what runs on this machine and whether it is ready; with a name, of each rank too."""
    from v4_ascend.deploy.containers.given import names as given_names
    from v4_ascend.deploy.containers.given import read
    from v4_ascend.deploy.state import generations, lost, names

    wanted = names() if name is None else [name]
    rows = [_row(s, with_ranks=name is not None) for n in wanted for s in generations(n)]
    rows += [_lost_row(s) for n in wanted for s in lost(n)]
    rows += [_given_row(g) for n in (given_names() if name is None else [name]) if (g := read(n))]
    if as_json:
        out = {"version": 1, "status": "ok", "data": rows, "diagnostics": []}
        typer.echo(json.dumps(out, indent=2))
    elif not rows:
        typer.echo("nothing runs" if name is None else f"{name} does not run")
    for row in rows if not as_json else ():
        canary = f", canary {row['canary']}" if row.get("canary") else ""
        line = f"{row['name']}: {row['state']}, {row['url']}/v1, model {row['model']}"
        if "waiting" in row:
            line += f", {row['running']} requests running, {row['waiting']} waiting"
        reason = f", {row['reason']}" if row.get("reason") else ""
        pid = f", pid {row['pid']}" if "pid" in row else f", given to {row['launcher']}"
        typer.echo(f"{line}{pid}{canary}{reason}")
        for c in row.get("containers", ()) if name is not None else ():
            trouble = f", {c['trouble']}" if c["trouble"] else ""
            typer.echo(f"  {c['name']} on {c['host']}: {c['state']}{trouble}")
        for process in row.get("processes", ()) if name is not None else ():
            answers = "answers" if process["is_ready"] else "does not answer"
            where = f"{process['url']} {answers}" if process["url"] else "no API"
            typer.echo(f"  {process['name']} on {process['host']}: {where}")
        for rank in row.get("ranks", ()):
            state = f"step {rank['step']}" if rank["is_ready"] else "not ready"
            loaded = f"{rank['loaded_bytes'] / 1e6:,.1f} MB read"
            loaded += f", {rank['resident_bytes'] / 1e6:,.1f} MB of weights"
            sent = sum(rank["bytes_sent"].values())
            loaded += f", {sent / 1e6:,.1f} MB sent" if sent else ""
            typer.echo(f"  {rank['what']}: {loaded}, {state}, pid {rank['pid']}")


def logs_command(
    name: Annotated[str, typer.Argument(help="a deployment")],
    rank: Annotated[int | None, typer.Option(help="of one rank alone")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="go on until the deployment ends")
    ] = False,
) -> None:
    """Print the logs of a deployment's processes."""
    from v4_ascend.deploy.containers.bringing_up import orchestrator
    from v4_ascend.deploy.containers.given import read
    from v4_ascend.deploy.logs import Logs
    from v4_ascend.deploy.state import find

    if (given := read(name)) is not None and find(name) is None:
        raise ConfigError(name, f"its logs are {given.launcher}'s: {orchestrator(given).logs()}")
    logs = Logs(name, rank)
    for line in logs.follow() if follow else logs.lines():
        typer.echo(line)


def down_command(
    name: Annotated[str, typer.Argument(help="a deployment")],
    timeout: Annotated[float, typer.Option(help="seconds to wait for it")] = 60.0,
) -> None:
    """Stop a deployment: running requests finish, then everything it started ends."""
    import os
    import signal
    import time

    from v4_ascend.deploy.containers.bringing_up import take_back
    from v4_ascend.deploy.containers.given import read
    from v4_ascend.deploy.state import generations, lost

    if (given := read(name)) is not None:
        take_back(given, lambda line: typer.echo(f"{name}: {line}"))
    for gone in lost(name):
        gone.forget()
        typer.echo(f"{name}: pid {gone.pid} is gone without having ended it; forgotten")
    found = generations(name)
    if not found:
        if given is None:
            typer.echo(f"{name} does not run")
        return
    for supervisor in found:
        os.kill(supervisor.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while left := [s for s in found if s.is_running()]:
        if time.monotonic() > deadline:
            raise DeadlineError(f"{name}: pid {left[0].pid} still runs after {timeout:g} s")
        time.sleep(0.1)
    typer.echo(f"{name}: stopped")


def _row(s: Supervisor, *, with_ranks: bool) -> dict[str, Any]:
    """Say of a process that runs a deployment what it is, and what its own front says."""
    import httpx

    inside = s.inside or s.url
    row = {"name": s.name, "pid": s.pid, "phase": s.phase, "url": s.url, "model": s.model}
    try:
        if s.engine == "vllm":
            from v4_ascend.deploy.vllm.deployment import status

            return row | status(Path(s.folder))
        row |= httpx.get(f"{inside}/ready", timeout=5).json()
        if with_ranks:
            row["ranks"] = httpx.get(f"{inside}/ranks", timeout=5).json()
    except httpx.TransportError as e:
        row["state"] = f"no answer: {e}" if s.phase == "serving" else s.phase
    return row


def _given_row(given: Given) -> dict[str, Any]:
    """Say of what was given to docker or Kubernetes how its containers are."""
    from dataclasses import asdict

    from v4_ascend.deploy.containers.bringing_up import is_ready, orchestrator, summary

    row: dict[str, Any] = {"name": given.name, "launcher": given.launcher, "phase": "given"}
    row |= {"url": given.url, "model": given.model}
    try:
        found = orchestrator(given).containers()
    except V4AscendError as e:
        return row | {"state": "unknown", "reason": str(e)}
    ready = is_ready(given, found)
    row |= {"state": "ready" if ready else "not ready", "containers": [asdict(c) for c in found]}
    return row if ready else row | {"reason": summary(found)}


def _lost_row(s: Supervisor) -> dict[str, Any]:
    again = f"v4-ascend deploy starts it again, v4-ascend down {s.name} forgets it"
    row = {"name": s.name, "pid": s.pid, "phase": "lost", "url": s.url, "model": s.model}
    return row | {"state": "lost", "reason": f"who ran it is gone; {again}"}
