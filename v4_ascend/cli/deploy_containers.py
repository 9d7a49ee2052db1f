"""`deploy` with launcher docker or kubernetes: files for others to start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from v4_ascend.errors import ConfigError, DeployError

if TYPE_CHECKING:
    from v4_ascend.config.topology import Topology
    from v4_ascend.deploy.containers.target import Target
    from v4_ascend.deploy.containers.written import Written


def dry_run(wanted: Topology, out: Path | None, *, as_json: bool) -> None:
    """Print the files of a deployment, or write them; say what starts it.

    Of one that was given to docker or Kubernetes before: how the files differ from those.
    """
    from v4_ascend.deploy.containers.given import read

    target = target_of(wanted)
    found, before = written(wanted, target), read(wanted.name)
    if out is not None:
        names = found.write(out)
    steps = found.steps_for(out)
    difference = before.difference(found) if before is not None else None
    if as_json:
        data: dict[str, Any] = {"launcher": wanted.launcher, "files": found.files, "steps": steps}
        data["action"] = "start" if difference is None else "change" if difference else "nothing"
        data["difference"] = difference or []
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    if out is None:
        if difference is None:
            typer.echo(found.shown(), nl=False)
            typer.echo("--out DIR writes these files, and what starts them", err=True)
            return
        for line in difference:
            typer.echo(line)
        typer.echo(f"{wanted.name}: {_would(difference)}")
        return
    for name in names:
        typer.echo(f"wrote {out}/{name}")
    for step in steps:
        typer.echo(step)


def _would(difference: list[str]) -> str:
    if not difference:
        return "nothing would be done"
    return "--replace downtime would take back what was given, then give this"


def start(wanted: Topology, timeout: float, *, is_downtime: bool) -> None:
    """Give a deployment to docker or Kubernetes and wait until it is ready; it goes on by itself.

    Raises:
        DeployError: it failed, or another one was given and is not to be taken back.
        BackendUnavailableError: docker or kubectl is not here.
        DeadlineError: not ready in time.
    """
    from v4_ascend.deploy.containers.bringing_up import (
        bring_up,
        find_given,
        is_ready,
        orchestrator,
        take_back,
    )
    from v4_ascend.deploy.containers.given import Given

    target = target_of(wanted)
    found, given = written(wanted, target), Given.of(target)

    def report(line: str) -> None:
        typer.echo(f"{given.name}: {line}", err=True)

    before = find_given(given)
    difference = before.difference(found) if before is not None else []
    if (
        before is not None
        and not difference
        and is_ready(before, orchestrator(before).containers())
    ):
        typer.echo(f"{given.name} runs already: {before.url}/v1")
        return
    if before is not None and difference:
        if not is_downtime:
            raise DeployError(
                f"{given.name} was given to {before.launcher} with other files, whose hosts must "
                "start together; --dry-run shows the difference, --replace downtime takes it back "
                "first"
            )
        take_back(before, report)
    bring_up(given, found, timeout, report)
    report(f"ready: {given.url}/v1, model {given.model}; it goes on without this command")


def refuse(*, emulate: int | None, conformance: bool) -> None:
    """Refuse options that start something here.

    Raises:
        ConfigError: naming one.
    """
    if emulate is not None:
        raise ConfigError("--emulate", "runs processes here: with launcher local, not containers")
    if conformance:
        raise ConfigError("--conformance", "nothing is started here: v4-ascend conformance URL")


def target_of(wanted: Topology) -> Target:
    """Plan a deployment of containers.

    Raises:
        PlanError: no layout is legal.
        ConfigError, NotYetError: something that containers cannot have.
    """
    from v4_ascend.config.topology import require_supported

    require_supported(wanted)
    return _vllm(wanted) if wanted.engine == "vllm" else _native(wanted)


def written(wanted: Topology, target: Target | None = None) -> Written:
    """Return the files of a deployment.

    Raises:
        PlanError: no layout is legal.
        ConfigError, NotYetError: something that containers cannot have.
    """
    from v4_ascend.deploy.containers.compose import compose_files
    from v4_ascend.deploy.containers.kubernetes import manifests

    target = target or target_of(wanted)
    return compose_files(target) if wanted.launcher == "docker" else manifests(target)


def _vllm(wanted: Topology) -> Target:
    from v4_ascend.cli.deploy_vllm import planned_pools
    from v4_ascend.deploy.containers.target import vllm
    from v4_ascend.deploy.vllm.launches import launches

    pools = planned_pools(wanted)
    return vllm(wanted, launches(wanted, pools), pools)


def _native(wanted: Topology) -> Target:
    from v4_ascend.checkpoint.sharded import ShardedFolder, open_folder
    from v4_ascend.deploy.containers.target import native
    from v4_ascend.supernode.planning import deploy_pool, find_model

    folder = Path(wanted.model.checkpoint)
    if not folder.is_dir():
        model = find_model(wanted)
        typer.echo(f"{wanted.name}: planned from {model.source}", err=True)
        return native(wanted, *deploy_pool(wanted, model.config))
    checkpoint = open_folder(folder)
    checkpoint.require_complete()
    plan, pool = deploy_pool(wanted, checkpoint.config)
    if isinstance(checkpoint, ShardedFolder):
        checkpoint.require_layout(plan)
    return native(wanted, plan, pool)
