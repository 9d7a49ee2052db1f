"""`bench plan`: how long the command takes to start, and a search for a layout."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from v4_ascend.cli.plan import ModelOption, SetOption, TopologyOption
from v4_ascend.errors import ConfigError


def plan_command(
    topology: TopologyOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="the best one counts")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Time the start of the command beside Python's own, and the search for a topology's layout."""
    from v4_ascend.checkpoint.sources import configuration
    from v4_ascend.config.topology import load_topology
    from v4_ascend.supernode.planning import find_model, plan_pools

    if topology is None:
        raise ConfigError("--topology", "missing; give a file, or a bundled name such as supernode")
    wanted = load_topology(topology, set_ or [])
    found = find_model(wanted, model, configuration)
    ours = [sys.executable, "-m", "v4_ascend"]
    ways: dict[str, Callable[[], Any]] = {
        "python": _start([sys.executable, "-c", "pass"]),
        "v4-ascend --help": _start([*ours, "--help"]),
        "search": lambda: plan_pools(wanted, found),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            best[way] = min(best[way], time.perf_counter() - start)
    pools = plan_pools(wanted, found)
    n_devices = sum(p.system.n_devices for p in pools)
    n_judged = sum(p.found.n_judged for p in pools)
    if as_json:
        data = {"what": "plan", "seconds": best, "devices": n_devices, "judged": n_judged}
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    start, search = best["v4-ascend --help"], best["search"]
    typer.echo("| | ms | |\n|---|---|---|")
    typer.echo(f"| python, which does nothing | {best['python'] * 1e3:,.0f} | |")
    typer.echo(f"| v4-ascend --help | {start * 1e3:,.0f} | {start / best['python']:.1f} x python |")
    each = f", {search / n_judged * 1e6:,.0f} us each" if n_judged else ""
    typer.echo(
        f"| search for {n_devices} devices | {search * 1e3:,.0f} | {n_judged:,} layouts{each} |"
    )


def _start(command: list[str]) -> Callable[[], Any]:
    return lambda: subprocess.run(command, check=True, capture_output=True)
