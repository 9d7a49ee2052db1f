"""What `deploy` would change of what runs, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from v4_ascend.config.topology import Topology
    from v4_ascend.deploy.changes import Change
    from v4_ascend.deploy.replacement import Running
    from v4_ascend.supernode.plan import Plan
    from v4_ascend.supernode.planning import PoolPlan


def dry_run(
    wanted: Topology,
    pool: PoolPlan,
    plan: Plan,
    running: Running | None,
    replace: str,
    *,
    as_json: bool,
) -> None:
    """Print the difference to what runs, and what would be done; the plan if nothing runs."""
    from v4_ascend.deploy.changes import Scope
    from v4_ascend.deploy.replacement import room_beside

    if running is None:
        if as_json:
            _print_json("start", plan, None, None)
        else:
            typer.echo(plan.model_dump_json(indent=2))
        return
    room = None
    if running.scope is Scope.ALL and replace == "shadow":
        room, _ = room_beside(running, wanted, pool, plan)
    action, sentence = "nothing", "nothing would be done"
    if running.scope is Scope.FRONT:
        action, sentence = "settings", "the running front would take this; nothing restarts"
    elif room is not None and room.is_enough:
        action, sentence = "shadow", f"a shadow would start, then take the address: {room.why}"
    elif room is not None:
        action, sentence = "refuse", f"{no_room(room.why)}"
    elif running.scope is Scope.ALL:
        action = "downtime"
        sentence = "it would be stopped, then started anew; nobody is served in between"
    if as_json:
        _print_json(action, plan, running, room.why if room is not None else None)
        return
    show(running)
    typer.echo(f"{plan.name}: {sentence}")


def no_room(why: str) -> str:
    """Say why there is no shadow, and what else there is."""
    return f"no room beside what runs: {why}; --replace downtime stops it first"


def show(running: Running, *, err: bool = False) -> None:
    """Print each changed setting: what runs, what is wanted, what it restarts."""
    s = running.supervisor
    typer.echo(f"{s.name} runs (pid {s.pid}, {s.url}); {_count(running.changes)}", err=err)
    rows = [(c.key, f"{c.running} -> {c.wanted}", c.restarts.value) for c in running.changes]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    for key, values, restarts in rows:
        typer.echo(f"  {key:<{widths[0]}}  {values:<{widths[1]}}  restarts {restarts}", err=err)


def _count(found: Sequence[Change]) -> str:
    return f"{len(found)} changed" if found else "nothing has changed"


def _print_json(action: str, plan: Plan, running: Running | None, room: str | None) -> None:
    shown = plan.model_dump(mode="json") | {"api_keys": ["(hidden)"] * len(plan.api_keys)}
    data: dict[str, Any] = {"name": plan.name, "action": action, "room": room, "plan": shown}
    if running is not None:
        s = running.supervisor
        data["running"] = {"pid": s.pid, "url": s.url, "digest": s.digest, "version": s.version}
        data["changes"] = [
            {"key": c.key, "running": c.running, "wanted": c.wanted, "restarts": c.restarts.name}
            for c in running.changes
        ]
    out = {"version": 1, "status": "ok", "data": data, "diagnostics": []}
    typer.echo(json.dumps(out, indent=2))
