"""`plan`, `plan diff`, `plan simulate`, `plan calibration`."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Annotated, Any

import typer

from v4_ascend.cli.group import Group
from v4_ascend.errors import ConfigError, PlanError

TopologyOption = Annotated[str | None, typer.Option("--topology", help="file, or a bundled name")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value")]
ModelOption = Annotated[
    str | None, typer.Option(help="config.json, checkpoint folder, hf:org/name or bundled name")
]
ExplainOption = Annotated[bool, typer.Option("--explain", help="every rule that refused layouts")]
OutOption = Annotated[Path | None, typer.Option(help="folder for plan, env files and page")]
TableOption = Annotated[
    Path | None, typer.Option(help="an HCCL rank table: its hosts, in place of host_count")
]
LoadOption = Annotated[Path | None, typer.Option(help="tokens of each expert: place by load")]
JsonOption = Annotated[bool, typer.Option("--json", help="for scripts")]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    plan = typer.Typer(cls=Group, help=plan_command.__doc__, no_args_is_help=False)
    plan.callback(invoke_without_command=True)(plan_command)
    plan.command("run")(run_command)
    plan.command("diff")(diff_command)
    plan.command("calibration")(calibration_command)
    plan.command("simulate")(simulate_command)
    app.add_typer(plan, name="plan")


def plan_command(
    context: typer.Context,
    topology: TopologyOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    explain: ExplainOption = False,
    rank_table: TableOption = None,
    expert_load: LoadOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank every legal layout of a topology; exit 3 if none is, with the reasons."""
    if context.invoked_subcommand is None:
        run_command(topology, set_, model, explain, rank_table, expert_load, out, as_json)


def run_command(
    topology: TopologyOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    explain: ExplainOption = False,
    rank_table: TableOption = None,
    expert_load: LoadOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank every legal layout of a topology; exit 3 if none is, with the reasons."""
    from v4_ascend.checkpoint.sources import configuration
    from v4_ascend.config.topology import load_topology
    from v4_ascend.supernode.experts import ExpertLoad
    from v4_ascend.supernode.planning import find_model, plan_pools
    from v4_ascend.supernode.report import report

    if topology is None:
        raise ConfigError("--topology", "missing; give a file, or a bundled name such as supernode")
    wanted = load_topology(topology, set_ or [])
    table = None
    if rank_table is not None:
        from v4_ascend.supernode.ranktable.file import read_table
        from v4_ascend.supernode.ranktable.planned import with_hosts

        table = read_table(rank_table, allow_planned=True)
        wanted = with_hosts(wanted, table, str(rank_table))
    found = find_model(wanted, model, configuration)
    load = ExpertLoad.read(expert_load, found.config) if expert_load is not None else None
    pools = plan_pools(wanted, found, load)
    # A larger pod changes little and doubles the time.
    grow = sum(p.system.n_devices for p in pools) <= 512
    facts = report(wanted, found, pools, grow=grow)
    failed = [p["role"] for p in facts["pools"] if p["chosen"] is None]
    written: list[str] = []
    if out is not None and not failed:
        from v4_ascend.supernode.bundle import write_bundle

        extra = {}
        if wanted.engine == "vllm":
            from v4_ascend.deploy.vllm.launches import launches
            from v4_ascend.deploy.vllm.show import script

            extra = {"launch.sh": script(launches(wanted, pools)) + "\n"}
        written = write_bundle(out, wanted, pools, facts, table, extra)
    if as_json:
        status = "error" if failed else "ok"
        envelope = {"version": 1, "status": status, "data": facts, "diagnostics": failed}
        typer.echo(json.dumps(envelope))
    else:
        from v4_ascend.cli.plan_tables import print_plan

        print_plan(facts, explain=explain or bool(failed))
        for name in written:
            typer.echo(f"wrote {out}/{name}")
    if failed:
        raise PlanError(_no_layout(facts))


def _no_layout(facts: dict[str, Any]) -> str:
    for pool in facts["pools"]:
        if pool["chosen"] is None:
            memory = [r for r in pool["rejected"] if r["rule"] == "M1"]
            nearest = memory[0]["examples"][0]["numbers"] if memory else "see the rules above"
            return (
                f"no legal layout of {facts['model']['name']} on {pool['n_devices']} x "
                f"{pool['device']}: {pool['n_judged']} judged, all refused; {nearest}"
            )
    raise AssertionError("every pool has a layout")


def diff_command(
    a: Annotated[Path, typer.Argument(help="plan.json, or a folder of `plan --out`")],
    b: Annotated[Path, typer.Argument(help="the other")],
    as_json: JsonOption = False,
) -> None:
    """Say what changes between two plans, and which ranks must load other weights."""
    from v4_ascend.supernode.diff import plan_diff
    from v4_ascend.supernode.plan import Plan

    first, second = (Plan.read(p / "plan.json" if p.is_dir() else p) for p in (a, b))
    changes = plan_diff(first, second)
    if as_json:
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": changes, "diagnostics": []}))
        return
    for change in changes["settings"]:
        typer.echo(f"{change['key']}: {change['from']} -> {change['to']}")
    typer.echo(
        f"{changes['ranks_moved']} of {changes['ranks']} ranks hold other layers or experts"
        if changes["settings"] or changes["ranks_moved"]
        else "the plans are the same"
    )


def simulate_command(
    topology: TopologyOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    slow: Annotated[list[str] | None, typer.Option(help="DEVICE=FACTOR, a straggler")] = None,
    failed: Annotated[int | None, typer.Option(help="a device that never answers")] = None,
    contention: Annotated[list[str] | None, typer.Option(help="LEVEL=FACTOR, shared links")] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate a decode step and a prefill of the best layout on every device, with faults."""
    from v4_ascend.checkpoint.sources import configuration
    from v4_ascend.config.topology import load_topology
    from v4_ascend.supernode.plan_simulation import decode_pipeline, prefill_pipeline
    from v4_ascend.supernode.planning import find_model, layout_name, plan_pools
    from v4_ascend.supernode.simulation import Faults, closed_form, simulate

    if topology is None:
        raise ConfigError("--topology", "missing; give a file, or a bundled name such as supernode")
    wanted = load_topology(topology, set_ or [])
    slower = _factors("--slow", slow or [])
    if odd := [name for name in slower if not name.isdecimal()]:
        raise ConfigError("--slow", f"{odd[0]!r} is no device number")
    faults = Faults(
        slow={int(device): factor for device, factor in slower.items()},
        failed=failed,
        contention=_factors("--contention", contention or []),
    )
    rows = []
    for pool in plan_pools(wanted, find_model(wanted, model, configuration)):
        if pool.chosen is None:
            raise PlanError(f"no legal layout on {pool.system.n_devices} devices; see plan")
        known = [name for name, _ in pool.system.levels] + ["inter"]
        if odd := sorted(faults.contention.keys() - set(known)):
            raise ConfigError("--contention", f"no level {odd[0]!r}; known are {', '.join(known)}")
        for what, make in (("decode step", decode_pipeline), ("prefill", prefill_pipeline)):
            if (what, pool.system.role) in (("decode step", "prefill"), ("prefill", "decode")):
                continue
            pipeline = make(pool, pool.chosen)
            seen = simulate(pipeline, faults)
            rows.append(
                {
                    "what": what,
                    "layout": layout_name(pool.chosen.parallel),
                    "n_devices": pipeline.n_devices,
                    "closed_form_ms": 1e3 * closed_form(pipeline),
                    "simulated_ms": None if seen.stalled else 1e3 * seen.step_s,
                    "busy": list(seen.busy),
                    "waiting": seen.waiting,
                    "stalled": asdict(seen.stalled) if seen.stalled else None,
                }
            )
    if as_json:
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": rows, "diagnostics": []}))
        return
    from v4_ascend.cli.plan_tables import print_simulation

    print_simulation(rows)


def _factors(option: str, given: list[str]) -> dict[str, float]:
    factors = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            factors[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(option, f"must be NAME=FACTOR, got {text!r}")
    return factors


def calibration_command(as_json: JsonOption = False) -> None:
    """Compare the time model with published runs, each predicted from all the others."""
    from v4_ascend.supernode.calibration import (
        calibration,
        constants,
        interval,
        leave_one_out,
        measured_rows,
        predict_ms,
    )

    judged = leave_one_out(measured_rows())
    errors = sorted(abs(j.error) for j in judged)
    base = sorted(abs(j.baseline_error) for j in judged)
    data = {
        "constants": list(astuple(constants())),
        "rows": [
            {
                "id": j.row.id,
                "tpot_ms": j.row.tpot_ms,
                "predicted_ms": j.predicted_ms,
                "error": j.error,
                "bytes_only_error": j.baseline_error,
                "source": j.row.source,
            }
            for j in judged
        ],
        "bounds": [
            {"id": r.id, "at_most_ms": r.tpot_ms, "predicted_ms": predict_ms(r, constants())}
            for r in calibration().rows
            if r.kind == "bound"
        ],
        "median_error": errors[len(errors) // 2],
        "worst_error": errors[-1],
        "bytes_only_median": base[len(base) // 2],
        "bytes_only_worst": base[-1],
        "interval": interval(judged),
        "n_constants": len(astuple(constants())),
    }
    if as_json:
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    from v4_ascend.cli.plan_tables import print_calibration

    print_calibration(data)
