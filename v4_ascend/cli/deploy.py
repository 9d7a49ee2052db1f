"""`deploy`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4_ascend.cli.deployments import down_command, logs_command, status_command
from v4_ascend.errors import ConfigError, DeadlineError, DeployError, PlanError

if TYPE_CHECKING:
    from v4_ascend.config.topology import Topology
    from v4_ascend.deploy.doctor.facts import Answer


class Replace(StrEnum):
    """How a plan comes in the place of another one that runs."""

    SHADOW = "shadow"
    DOWNTIME = "downtime"


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
        bool, typer.Option("--dry-run", help="print what would be done, start nothing")
    ] = False,
    replace: Annotated[
        Replace, typer.Option(help="if another plan runs: start beside it, or stop it first")
    ] = Replace.SHADOW,
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
    as_json: Annotated[bool, typer.Option("--json", help="with --dry-run, for scripts")] = False,
) -> None:
    """Start a deployment, or change the one that runs; serve until Ctrl-C."""
    from v4_ascend.checkpoint.sharded import ShardedFolder, open_folder
    from v4_ascend.checkpoint.sources import headers, pinned
    from v4_ascend.cli import deploy_changes
    from v4_ascend.cli.progress import reporter
    from v4_ascend.config.topology import load_topology, require_supported
    from v4_ascend.deploy import replacement
    from v4_ascend.deploy.changes import Scope
    from v4_ascend.deploy.state import vacant
    from v4_ascend.supernode.planning import deploy_pool

    overrides = [*(set_ or []), *([f"serve.port={port}"] if port is not None else [])]
    wanted = load_topology(topology, overrides)
    options = {"--timeout": timeout, "--drain-timeout": drain_timeout, "--emulate": emulate}
    unlooked = ["--skip-preflight"] * skip_preflight
    if wanted.launcher in ("docker", "kubernetes"):
        from v4_ascend.cli import deploy_containers

        deploy_containers.refuse(emulate=emulate, conformance=conformance)
        if dry_run:
            deploy_containers.dry_run(wanted, out, as_json=as_json)
        elif out is not None or as_json:
            raise ConfigError("--out" if out is not None else "--json", "goes with --dry-run")
        else:
            is_downtime = replace is Replace.DOWNTIME
            deploy_containers.start(wanted, timeout, is_downtime=is_downtime)
        return
    if out is not None:
        raise ConfigError("--out", f"is of launchers docker and kubernetes, not {wanted.launcher}")
    if wanted.engine == "vllm":
        from v4_ascend.cli import deploy_vllm

        deploy_vllm.refuse_emulation(emulate)
        work, there = deploy_vllm.wanted_and_running(wanted)
        if dry_run:
            is_downtime = replace is Replace.DOWNTIME
            deploy_vllm.dry_run(work, there, is_downtime=is_downtime, as_json=as_json)
            return
        require_supported(wanted)
        if there is not None and not there.differences:
            typer.echo(f"{wanted.name} runs already: {there.supervisor.url}/v1")
            return
        deploy_vllm.require_possible(wanted, work, there, is_shadow=replace is Replace.SHADOW)
        if detach:
            switches = [*unlooked, *(["--conformance"] * conformance), "--replace", replace.value]
            _detach(topology, overrides, vacant(wanted.name), options, switches)
            return
        ours = {"devices.memory", "network.ports", "host.memory"} if there is not None else ()
        _preflight(wanted, _again(topology), skip=skip_preflight, left_out=ours)
        deploy_vllm.run(work, there, drain_timeout, timeout, conformance=conformance)
        return
    if conformance:
        instead = "with engine native take v4-ascend conformance URL"
        raise ConfigError("--conformance", f"is of engine vllm; {instead}")
    if as_json and not dry_run:
        raise ConfigError("--json", "goes with --dry-run, and with status once it runs")
    if emulate is not None or wanted.emulate:
        n_ranks = wanted.cluster.n_devices if emulate is None else emulate
        wanted = _stand_in(wanted, n_ranks, is_told=not detach)
    require_supported(wanted)
    # Every process is to read the revision that is looked at here.
    wanted = wanted.with_checkpoint(pinned(wanted.model.checkpoint, with_weights=not dry_run))
    with reporter("fetching headers") as progress, headers(wanted.model.checkpoint, progress) as at:
        checkpoint = open_folder(at)
        checkpoint.require_complete()
        plan, pool = deploy_pool(wanted, checkpoint.config)
        if isinstance(checkpoint, ShardedFolder):
            checkpoint.require_layout(plan)
    running = replacement.find_running(plan)
    if dry_run:
        deploy_changes.dry_run(wanted, pool, plan, running, replace.value, as_json=as_json)
        return
    if running is not None and running.scope is Scope.NOTHING:
        typer.echo(f"{plan.name} runs already: {running.supervisor.url}/v1")
        return
    if running is not None and running.scope is Scope.FRONT:
        deploy_changes.show(running)
        replacement.change_settings(running, plan)
        typer.echo(f"{plan.name}: in force; nothing was restarted")
        return

    def report(line: str) -> None:
        typer.echo(f"{plan.name}: {line}", err=True)

    if running is not None:
        replacement.wait_until_alone(running, timeout, report)
    if detach:
        switches = ["--replace", replace.value, *unlooked]
        _detach(topology, overrides, vacant(plan.name), options, switches)
        return
    from v4_ascend.deploy.deployment import Deployment

    if not plan.emulated and plan.backend != "cpu":  # which is here: no need to import torch
        from v4_ascend.backends import find_backend

        find_backend(plan.backend, "runtime.backend").require()
    look = partial(_preflight, wanted, _again(topology), skip=skip_preflight)
    if running is None:
        look()
        Deployment(plan, report, drain_timeout, vacant(plan.name)).run(timeout)
        return
    deploy_changes.show(running, err=True)
    ours = {"devices.memory", "network.ports"}  # the running one's, and looked at elsewhere
    if replace is Replace.DOWNTIME:
        look(left_out=ours | {"host.memory"})
        replacement.replace_stopped(plan, report, drain_timeout, timeout, running)
        return
    room, answers = replacement.room_beside(running, wanted, pool, plan)
    if not room.is_enough:
        raise PlanError(f"{plan.name}: {deploy_changes.no_room(room.why)}")
    report(f"a shadow starts beside pid {running.supervisor.pid}: {room.why}")
    look(left_out=ours, answers=answers)
    replacement.Shadow(room, report, drain_timeout, running.supervisor).run(timeout)


def _again(topology: str) -> str:
    return f"v4-ascend doctor --topology {topology}"


def _preflight(
    wanted: Topology,
    again: str,
    *,
    skip: bool,
    left_out: Collection[str] = (),
    answers: Sequence[Answer] | None = None,
) -> None:
    """Look at every host before anything starts, or say what was not looked at."""
    from v4_ascend.deploy.torchrun import require_first_here

    require_first_here([h for s in wanted.cluster.supernodes for h in s.hosts or ()])
    if skip:
        what = "versions, devices, network, clocks, memory, disks, checkpoints"
        typer.echo(f"{wanted.name}: preflight skipped: {what}", err=True)
        return
    from v4_ascend.deploy.doctor.preflight import look, require_fit

    require_fit(wanted, again, answers if answers is not None else look(wanted), left_out)


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
    folder: Path,
    options: dict[str, float | None],
    switches: Sequence[str],
) -> None:
    """Start ourselves in a session of our own and follow until ready or ended."""
    import subprocess
    import sys
    import time

    from v4_ascend.config.private import open_private, private_folder

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
    # What is replaced drains first, and may have to be started again.
    patience = 2 * timeout + (options["--drain-timeout"] or 0.0) + 60
    shown, deadline = 0, time.monotonic() + patience
    while time.monotonic() < deadline:
        ended = process.poll()
        lines = log.read_text(encoding="utf-8").splitlines()
        for line in lines[shown:]:
            typer.echo(line, err=True)
        shown = len(lines)
        if went_back := next((x for x in lines if ": gone back: ready: " in x), None):
            raise DeployError(f"{went_back}; why: {log}")
        if any(": ready: " in line for line in lines):
            return
        if ended is not None:
            raise typer.Exit(ended)
        time.sleep(0.1)
    raise DeadlineError(f"{folder.name}: no word after {patience:g} s; log: {log}")
