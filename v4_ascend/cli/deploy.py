"""`deploy`, `status`, `logs` and `down`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4_ascend.errors import ConfigError, DeadlineError, DeployError

if TYPE_CHECKING:
    from v4_ascend.config.topology import Topology


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("deploy")(deploy_command)
    app.command("status")(status_command)
    app.command("logs")(logs_command)
    app.command("down")(down_command)


def deploy_command(
    topology: Annotated[str, typer.Option("--topology", help="file, or a bundled name")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value")] = None,
    port: Annotated[int | None, typer.Option(help="instead of serve.port")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="return once it is ready")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan, start nothing")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="launchers docker and kubernetes: folder for --dry-run")
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds until it must be ready")] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="seconds that running requests have to end when stopped")
    ] = 30.0,
    skip_preflight: Annotated[
        bool, typer.Option("--skip-preflight", help="do not look at the hosts first")
    ] = False,
    emulate: Annotated[
        int | None, typer.Option(help="run its layout here, on as many processes, tiny model")
    ] = None,
    conformance: Annotated[
        bool, typer.Option("--conformance", help="engine vllm: ready once its cases pass")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="engine vllm, docker, kubernetes: with --dry-run")
    ] = False,
) -> None:
    """Start a deployment, wait until it is ready, and serve until Ctrl-C."""
    from v4_ascend.checkpoint.sharded import ShardedFolder, open_folder
    from v4_ascend.checkpoint.sources import headers, pinned
    from v4_ascend.cli.progress import reporter
    from v4_ascend.config.topology import load_topology, require_supported
    from v4_ascend.deploy.state import find
    from v4_ascend.supernode.planning import deploy_plan

    overrides = [*(set_ or []), *([f"serve.port={port}"] if port is not None else [])]
    wanted = load_topology(topology, overrides)
    options = {"--timeout": timeout, "--drain-timeout": drain_timeout, "--emulate": emulate}
    unlooked = ["--skip-preflight"] * skip_preflight
    if wanted.launcher in ("docker", "kubernetes"):
        from v4_ascend.cli import deploy_containers

        deploy_containers.refuse(emulate=emulate, conformance=conformance)
        if not dry_run:
            deploy_containers.refuse_to_start(wanted, topology)
        deploy_containers.dry_run(wanted, out, as_json=as_json)
        return
    if out is not None:
        raise ConfigError("--out", f"is of launchers docker and kubernetes, not {wanted.launcher}")
    if wanted.engine == "vllm":
        from v4_ascend.cli import deploy_vllm

        deploy_vllm.refuse_emulation(emulate)
        if dry_run:
            deploy_vllm.dry_run(wanted, as_json=as_json)
            return
        require_supported(wanted)
        if deploy_vllm.already_running(wanted):
            return
        if detach:
            switches = [*unlooked, *(["--conformance"] * conformance)]
            _detach(topology, overrides, wanted.name, options, switches)
            return
        _preflight(wanted, topology, skip=skip_preflight)
        deploy_vllm.run(wanted, drain_timeout, timeout, conformance=conformance)
        return
    if conformance or as_json:
        option = "--conformance" if conformance else "--json"
        instead = "v4-ascend conformance URL" if conformance else "--dry-run, which prints JSON"
        raise ConfigError(option, f"is of engine vllm; with engine native take {instead}")
    if emulate is not None:
        wanted = _stand_in(wanted, emulate, is_told=not detach)
    require_supported(wanted)
    if not dry_run:  # every process is to read the revision that is looked at here
        wanted = wanted.with_checkpoint(pinned(wanted.model.checkpoint))
    with reporter("fetching headers") as progress, headers(wanted.model.checkpoint, progress) as at:
        checkpoint = open_folder(at)
        checkpoint.require_complete()
        plan = deploy_plan(wanted, checkpoint.config)
        if isinstance(checkpoint, ShardedFolder):
            checkpoint.require_layout(plan)
    if dry_run:
        typer.echo(plan.model_dump_json(indent=2))
        return
    if (found := find(plan.name)) is not None:
        if found.digest != plan.digest:
            raise DeployError(
                f"{plan.name} runs already (pid {found.pid}, {found.url}) with another plan; "
                f"v4-ascend down {plan.name} first"
            )
        typer.echo(f"{plan.name} runs already: {found.url}/v1")
        return
    if detach:
        _detach(topology, overrides, plan.name, options, unlooked)
        return
    from v4_ascend.deploy.deployment import Deployment

    if not plan.emulated and plan.backend != "cpu":  # which is here: no need to import torch
        from v4_ascend.backends import find_backend

        find_backend(plan.backend, "runtime.backend").require()

    def report(line: str) -> None:
        typer.echo(f"{plan.name}: {line}", err=True)

    _preflight(wanted, topology, skip=skip_preflight)
    Deployment(plan, report, drain_timeout).run(timeout)


def _preflight(wanted: Topology, topology: str, *, skip: bool) -> None:
    """Look at every host before anything starts, or say what was not looked at."""
    from v4_ascend.deploy.torchrun import require_first_here

    require_first_here([h for s in wanted.cluster.supernodes for h in s.hosts or ()])
    if skip:
        what = "versions, devices, network, clocks, memory, disks, checkpoints"
        typer.echo(f"{wanted.name}: preflight skipped: {what}", err=True)
        return
    from v4_ascend.deploy.doctor.preflight import require_fit

    require_fit(wanted, f"v4-ascend doctor --topology {topology}")


def _stand_in(real: Topology, n_ranks: int, *, is_told: bool) -> Topology:
    """Plan the real topology, and return its layout for processes of this machine."""
    from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
    from v4_ascend.deploy.state import state_root
    from v4_ascend.errors import PlanError
    from v4_ascend.supernode.planning import bundled_model, find_model, plan_pools
    from v4_ascend.supernode.stand_in import ledger, local_topology

    if n_ranks < 1:
        raise ConfigError("--emulate", f"{n_ranks} processes; at least 1")
    if real.cluster.pools:
        raise ConfigError("--emulate", "a topology of pools: not yet; plan says what each would do")
    (pool,) = plan_pools(real, find_model(real))
    if pool.chosen is None:
        raise PlanError(f"no legal layout on {pool.system.n_devices} devices; see v4-ascend plan")
    # Unquantised, so that TP may split it finer than a block of scales.
    config = in_format(bundled_model("tiny", "--emulate"), "fp32")
    folder = state_root() / "emulated-tiny-fp32"
    if not folder.exists():
        write_synthetic(config, folder, seed=0)
    local = local_topology(real, pool, n_ranks, str(folder), config)
    if local.layout != "auto" and is_told:  # detached, the process that stays tells it
        for line in ledger(pool, n_ranks, local.layout):
            typer.echo(f"{real.name}: {line}", err=True)
    return local


def _detach(
    topology: str,
    overrides: list[str],
    name: str,
    options: dict[str, float | None],
    switches: Sequence[str],
) -> None:
    """Start ourselves in a session of our own and follow until ready or ended."""
    import subprocess
    import sys
    import time

    from v4_ascend.config.private import open_private, private_folder
    from v4_ascend.deploy.state import state_root

    folder = state_root() / name
    private_folder(folder)
    log = folder / "supervisor.log"
    command = [sys.executable, "-m", "v4_ascend", "deploy", "--topology", topology]
    command += [a for o in overrides for a in ("--set", o)]
    for option, value in options.items():
        command += [option, str(value)] if value is not None else []
    command += switches
    with open_private(log) as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    timeout = options["--timeout"] or 0.0
    shown, deadline = 0, time.monotonic() + timeout + 60
    while time.monotonic() < deadline:
        ended = process.poll()
        lines = log.read_text(encoding="utf-8").splitlines()
        for line in lines[shown:]:
            typer.echo(line, err=True)
        shown = len(lines)
        if any(": ready: " in line for line in lines):
            return
        if ended is not None:
            raise typer.Exit(ended)
        time.sleep(0.1)
    raise DeadlineError(f"{name}: no word after {timeout:g} s; log: {log}")


def status_command(
    name: Annotated[str | None, typer.Argument(help="one deployment")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Say what runs on this machine and whether it is ready; with a name, of each rank too."""
    import httpx

    from v4_ascend.deploy.state import running, state_root

    rows: list[dict[str, Any]] = []
    for s in running():
        if name not in (None, s.name):
            continue
        try:
            if s.engine == "vllm":
                from v4_ascend.deploy.vllm.deployment import status

                ready = status(state_root() / s.name)
            else:
                ready = httpx.get(f"{s.url}/ready", timeout=5).json()
        except httpx.TransportError as e:
            ready = {"state": f"no answer: {e}"}
        row = {"name": s.name, "pid": s.pid, "url": s.url, "model": s.model, **ready}
        if name is not None and "is_ready" in ready:
            row["ranks"] = httpx.get(f"{s.url}/ranks", timeout=5).json()
        rows.append(row)
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
        typer.echo(f"{line}, pid {row['pid']}{canary}{reason}")
        for process in row.get("processes", ()) if name is not None else ():
            answers = "answers" if process["is_ready"] else "does not answer"
            where = f"{process['url']} {answers}" if process["url"] else "no API"
            typer.echo(f"  {process['name']} on {process['host']}: {where}")
        for rank in row.get("ranks", ()):
            state = f"step {rank['step']}" if rank["is_ready"] else "not ready"
            loaded = f"{rank['loaded_bytes'] / 1e6:,.1f} MB read"
            loaded += f", {rank['resident_bytes'] / 1e6:,.1f} MB of weights"
            typer.echo(f"  {rank['what']}: {loaded}, {state}, pid {rank['pid']}")


def logs_command(
    name: Annotated[str, typer.Argument(help="a deployment")],
    rank: Annotated[int | None, typer.Option(help="of one rank alone")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="go on until the deployment ends")
    ] = False,
) -> None:
    """Print the logs of a deployment's processes."""
    from v4_ascend.deploy.logs import Logs

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

    from v4_ascend.deploy.state import find

    found = find(name)
    if found is None:
        typer.echo(f"{name} does not run")
        return
    os.kill(found.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while found.is_running():
        if time.monotonic() > deadline:
            raise DeadlineError(f"{name}: pid {found.pid} still runs after {timeout:g} s")
        time.sleep(0.1)
    typer.echo(f"{name}: stopped")
