"""`deploy` with `engine: vllm`: print the commands, or run them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from v4_ascend.errors import ConfigError, DeployError, PlanError

if TYPE_CHECKING:
    from v4_ascend.config.topology import Topology
    from v4_ascend.deploy.vllm.launches import Launch
    from v4_ascend.deploy.vllm.replacement import Running
    from v4_ascend.deploy.vllm.work import Work
    from v4_ascend.supernode.plan import Plan
    from v4_ascend.supernode.planning import PoolPlan


def planned(wanted: Topology) -> tuple[tuple[Launch, ...], Plan]:
    """Return the processes of a topology, and the plan of its first pool.

    Raises:
        PlanError: no layout is legal.
    """
    from v4_ascend.deploy.vllm.launches import launches
    from v4_ascend.supernode.planning import plan_for

    pools = planned_pools(wanted)
    return launches(wanted, pools), plan_for(wanted, pools[0])


def planned_pools(wanted: Topology) -> tuple[PoolPlan, ...]:
    """Plan every pool of a topology.

    Raises:
        PlanError: no layout is legal.
    """
    from v4_ascend.checkpoint.sources import configuration
    from v4_ascend.supernode.planning import find_model, plan_pools

    pools = plan_pools(wanted, find_model(wanted, None, configuration))
    for pool in pools:
        if pool.chosen is None:
            raise PlanError(
                f"no legal layout of {wanted.model.name} on {pool.system.n_devices} x "
                f"{pool.system.profile.name} ({pool.system.role}); v4-ascend plan --explain has "
                "all reasons"
            )
    return pools


def wanted_and_running(wanted: Topology) -> tuple[Work, Running | None]:
    """Return what a topology is to run, and what runs in its place.

    Raises:
        PlanError: no layout is legal.
        NotYetError: it has several keys.
        DeployError: what runs cannot be replaced.
    """
    from v4_ascend.deploy.vllm.replacement import find_running
    from v4_ascend.deploy.vllm.work import Work

    launches, plan = planned(wanted)
    work = Work.of(wanted, plan, launches)
    return work, find_running(work)


def require_possible(
    wanted: Topology, work: Work, running: Running | None, *, is_shadow: bool
) -> None:
    """Refuse what cannot be started, before anything is stopped.

    Raises:
        DeployError: something else runs, and is not to be stopped.
        BackendUnavailableError, NotYetError, ConfigError: what is wanted cannot be started here.
    """
    from v4_ascend.deploy.vllm.deployment import require_startable

    if running is not None and is_shadow:
        show(running, err=True)
        raise DeployError(f"{wanted.name} {no_shadow(running)}")
    require_startable(wanted, work.launches)


def dry_run(work: Work, running: Running | None, *, is_downtime: bool, as_json: bool) -> None:
    """Print the commands of every host; of what runs, how they differ and what would be done."""
    from v4_ascend.deploy.vllm.show import as_data, script

    action, sentence = _action(running, is_downtime=is_downtime)
    if as_json:
        data = as_data(work.launches) | {"action": action}
        if running is not None:
            data["changes"] = [asdict(d) for d in running.differences]
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    if running is None:
        typer.echo(script(work.launches))
        return
    show(running)
    typer.echo(f"{work.plan.name}: {sentence}")


def _action(running: Running | None, *, is_downtime: bool) -> tuple[str, str]:
    if running is None:
        return "start", ""
    if not running.differences:
        return "nothing", "nothing would be done"
    if is_downtime:
        return "downtime", "it would be stopped, then started anew; nobody is served in between"
    return "refuse", no_shadow(running)


def no_shadow(running: Running) -> str:
    """Say why there is no shadow, and what else there is."""
    s = running.supervisor
    return (
        f"runs already (pid {s.pid}, {s.url}) with other commands, and vLLM cannot wait beside "
        f"them; --replace downtime stops it first"
    )


def show(running: Running, *, err: bool = False) -> None:
    """Print each difference: what runs, what is wanted, of how many processes."""
    s, found = running.supervisor, running.differences
    count = f"{len(found)} changed" if found else "nothing has changed"
    typer.echo(f"{s.name} runs (pid {s.pid}, {s.url}); {count}", err=err)
    for d in found:
        of = f"  of {d.n_processes} processes" if d.n_processes > 1 else ""
        typer.echo(f"  {d.what}  {d.running} -> {d.wanted}{of}", err=err)


def run(
    work: Work,
    running: Running | None,
    drain_timeout: float,
    timeout: float,
    *,
    conformance: bool,
) -> None:
    """Run it here and on the other hosts until Ctrl-C, in the place of what runs."""
    from v4_ascend.deploy.state import vacant
    from v4_ascend.deploy.vllm.deployment import VllmDeployment
    from v4_ascend.deploy.vllm.replacement import replace_stopped

    plan = work.plan

    def report(line: str) -> None:
        typer.echo(f"{plan.name}: {line}", err=True)

    def cases(url: str) -> None:
        from v4_ascend.runtime.conformance.run import require_all_passed, run_cases

        outcomes = run_cases(url, plan.model_name, work.key, lambda done, of: None)
        passed = sum(o.status == "passed" for o in outcomes)
        report(f"conformance: {passed} of {len(outcomes)} cases passed")
        require_all_passed(outcomes)

    checks = cases if conformance else None
    if running is not None:
        show(running, err=True)
        replace_stopped(work, running, report, drain_timeout, timeout, checks)
        return
    VllmDeployment(work, report, drain_timeout, checks, vacant(plan.name)).run(timeout)


def refuse_emulation(emulate: int | None) -> None:
    """Refuse --emulate, which is of the native engine."""
    if emulate is not None:
        raise ConfigError("--emulate", "engine vllm runs on real devices; --dry-run shows it")
