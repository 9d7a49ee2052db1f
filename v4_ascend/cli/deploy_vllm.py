"""`deploy` with `engine: vllm`: print the commands, or run them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from v4_ascend.errors import ConfigError, DeployError, PlanError

if TYPE_CHECKING:
    from v4_ascend.config.topology import Topology
    from v4_ascend.deploy.vllm.launches import Launch
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


def dry_run(wanted: Topology, *, as_json: bool) -> None:
    """Print the commands of every host."""
    from v4_ascend.deploy.vllm.show import as_data, script

    found, _ = planned(wanted)
    if as_json:
        data = as_data(found)
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
    else:
        typer.echo(script(found))


def run(wanted: Topology, drain_timeout: float, timeout: float, *, conformance: bool) -> None:
    """Run them here and on the other hosts until Ctrl-C."""
    from v4_ascend.deploy.vllm.deployment import VllmDeployment

    found, plan = planned(wanted)

    def report(line: str) -> None:
        typer.echo(f"{plan.name}: {line}", err=True)

    def cases(url: str) -> None:
        from v4_ascend.runtime.conformance.run import require_all_passed, run_cases

        key = next(iter(wanted.serve.api_keys), None)
        outcomes = run_cases(url, plan.model_name, key, lambda done, of: None)
        passed = sum(o.status == "passed" for o in outcomes)
        report(f"conformance: {passed} of {len(outcomes)} cases passed")
        require_all_passed(outcomes)

    checks = cases if conformance else None
    VllmDeployment(wanted, plan, found, report, drain_timeout, checks).run(timeout)


def already_running(wanted: Topology) -> bool:
    """Say whether these very commands run already.

    Raises:
        DeployError: others run under this name.
    """
    from v4_ascend.deploy.state import find
    from v4_ascend.deploy.vllm.deployment import digest

    if (running := find(wanted.name)) is None:
        return False
    if running.digest != digest(planned(wanted)[0]):
        raise DeployError(
            f"{wanted.name} runs already (pid {running.pid}, {running.url}) with another plan; "
            f"v4-ascend down {wanted.name} first"
        )
    typer.echo(f"{wanted.name} runs already: {running.url}/v1")
    return True


def refuse_emulation(emulate: int | None) -> None:
    """Refuse --emulate, which is of the native engine."""
    if emulate is not None:
        raise ConfigError("--emulate", "engine vllm runs on real devices; --dry-run shows it")
