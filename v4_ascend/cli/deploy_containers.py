"""`deploy` with launcher docker or kubernetes: files for others to start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from v4_ascend.errors import ConfigError, NotYetError

if TYPE_CHECKING:
    from v4_ascend.config.topology import Topology
    from v4_ascend.deploy.containers.target import Target
    from v4_ascend.deploy.containers.written import Written


def dry_run(wanted: Topology, out: Path | None, *, as_json: bool) -> None:
    """Print the files of a deployment, or write them; say what starts it."""
    found = written(wanted)
    if out is not None:
        names = found.write(out)
    steps = found.steps_for(out)
    if as_json:
        data = {"launcher": wanted.launcher, "files": found.files, "steps": steps}
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    if out is None:
        typer.echo(found.shown(), nl=False)
        typer.echo("--out DIR writes these files, and what starts them", err=True)
        return
    for name in names:
        typer.echo(f"wrote {out}/{name}")
    for step in steps:
        typer.echo(step)


def refuse(*, emulate: int | None, conformance: bool) -> None:
    """Refuse options that start something here.

    Raises:
        ConfigError: naming one.
    """
    if emulate is not None:
        raise ConfigError("--emulate", "runs processes here: with launcher local, not containers")
    if conformance:
        raise ConfigError("--conformance", "nothing is started here: v4-ascend conformance URL")


def refuse_to_start(wanted: Topology, topology: str) -> None:
    """Refuse: what containers run is written here and started by others.

    Raises:
        NotYetError: always, saying what to do.
    """
    raise NotYetError(
        wanted.where("launcher"),
        f"launcher: {wanted.launcher}: deploy starts no containers yet; write its files with "
        f"deploy --topology {topology} --dry-run --out DIR, and type what it says then",
    )


def written(wanted: Topology) -> Written:
    """Plan a deployment and return its files.

    Raises:
        PlanError: no layout is legal.
        ConfigError, NotYetError: something that containers cannot have.
    """
    from v4_ascend.config.topology import require_supported
    from v4_ascend.deploy.containers.compose import compose_files
    from v4_ascend.deploy.containers.kubernetes import manifests

    require_supported(wanted)
    target = _vllm(wanted) if wanted.engine == "vllm" else _native(wanted)
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
