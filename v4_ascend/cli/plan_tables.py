"""What `plan` and `fit` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from v4_ascend.cli.console import new_console
from v4_ascend.supernode.versus_v32 import TokenCost

GB = 1e9


def print_plan(facts: Mapping[str, Any], *, explain: bool) -> None:
    """Print the layouts of each pool, the chosen one's memory, and what was refused."""
    console = new_console()
    model, serve = facts["model"], facts["serve"]
    console.print(
        f"{model['name']} ({model['weight_format']} weights, {model['weight_bytes'] / GB:,.1f} GB; "
        f"{model['source']})"
    )
    console.print(
        f"context {serve['max_model_len']:,}, {serve['concurrency']} running, objective "
        f"{serve['objective']}, engine {serve['engine']}, requests of {serve['input_tokens']:,} + "
        f"{serve['output_tokens']:,} tokens"
    )
    for pool in facts["pools"]:
        _print_pool(pool, explain=explain)
    console.print(
        "times are modelled from cited figures, with intervals; nothing was measured on the device"
    )


def _print_pool(pool: Mapping[str, Any], *, explain: bool) -> None:
    console = new_console()
    role = "" if pool["role"] == "both" else f"{pool['role']}: "
    console.print(
        f"\n{role}{pool['n_devices']} x {pool['device']} on {len(pool['hosts'])} hosts: "
        f"{pool['n_legal']} of {pool['n_judged']} layouts are legal",
        style="bold",
    )
    if pool["chosen"] is not None:
        _print_layouts(pool)
        _print_memory(pool["chosen"])
        if pool["one_more_host"]:
            console.print(f"one more host: {pool['one_more_host']}")
    for note in pool["notes"]:
        console.print(f"note {note['rule']}: {note['text']} [{note['source']}]")
    if not explain:
        counts = ", ".join(f"{r['count']} by {r['rule']}" for r in pool["rejected"])
        console.print(f"refused: {counts or 'none'}; --explain says why")
        return
    for rule in pool["rejected"]:
        console.print(f"\n{rule['code']} ({rule['rule']}) refused {rule['count']}: {rule['text']}")
        console.print(f"  source: {rule['source']}, {rule['date']}")
        for example in rule["examples"]:
            console.print(f"  {example['layout']}: {example['numbers']}")


def _print_layouts(pool: Mapping[str, Any]) -> None:
    names = [f["name"] for f in pool["chosen"]["figures"]]
    table = Table(
        "layout", "devices", "batch", *names, "longest", "full requests", "against the best"
    )
    for choice in (pool["chosen"], *pool["alternatives"]):
        idle = f" ({choice['n_idle']} idle)" if choice["n_idle"] else ""
        late = "" if choice["meets_slo"] else " misses the SLO"
        table.add_row(
            choice["layout"],
            f"{choice['n_used']}{idle}",
            str(choice["batch_per_dp"]),
            *(
                f"{f['value']:,.1f} {f['unit']}\n{f['low']:,.1f} to {f['high']:,.1f}"
                for f in choice["figures"]
            ),
            f"{choice['max_context']:,}",
            f"{choice['full_requests']:,}",
            choice["trade_off"] + late,
        )
    new_console().print(table)


def _print_memory(choice: Mapping[str, Any]) -> None:
    stages = choice["stages"]
    names = list(dict.fromkeys(name for s in stages for name in s["memory"]))
    shown = stages if len(stages) <= 6 else [*stages[:3], *stages[-2:]]
    ranges = (f"layers {s['layers'][0]}-{s['layers'][1] - 1}" for s in shown)
    table = Table("GB of one rank", *ranges)
    for name in names:
        table.add_row(name, *(f"{s['memory'].get(name, 0) / GB:.2f}" for s in shown))
    table.add_row("one full-length request", *(f"{s['context_bytes'] / GB:.2f}" for s in shown))
    table.add_row(
        "left for more",
        *(
            f"{(s['available'] - sum(s['memory'].values()) - s['context_bytes']) / GB:.2f}"
            for s in shown
        ),
    )
    table.add_row(
        "usable of the device",
        *(f"{s['available'] / GB:.1f} of {s['device_memory'] / GB:.1f}" for s in shown),
    )
    new_console().print(table)


def print_calibration(data: Mapping[str, Any]) -> None:
    """Print predictions beside published runs."""
    console = new_console()
    table = Table("run", "published ms", "predicted ms", "error", "bytes alone", "source")
    for row in data["rows"]:
        table.add_row(
            row["id"],
            f"{row['tpot_ms']:.2f}",
            f"{row['predicted_ms']:.2f}",
            f"{row['error']:+.0%}",
            f"{row['bytes_only_error']:+.0%}",
            row["source"],
        )
    console.print(table)
    console.print(
        f"each predicted from all the others: median error {data['median_error']:.0%}, worst "
        f"{data['worst_error']:.0%}; bytes alone: median {data['bytes_only_median']:.0%}, worst "
        f"{data['bytes_only_worst']:.0%}"
    )
    console.print(
        f"{data['n_constants']} constants, {len(data['rows'])} runs; 8 of 10 unseen runs lie "
        f"within a factor of {data['interval']:.2f}, which widens every printed interval"
    )
    for bound in data["bounds"]:
        console.print(
            f"{bound['id']}: stated to keep {bound['at_most_ms']:g} ms, predicted "
            f"{bound['predicted_ms']:.1f} (not fitted)"
        )


def print_simulation(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print simulated times beside the closed form, or where a device stops everything."""
    console = new_console()
    times = ("simulated ms", "closed form ms")
    table = Table("what", "layout", "devices", *times, "stages busy", "waiting at barriers")
    for r in rows:
        busy = f"{min(r['busy']):.0%} to {max(r['busy']):.0%}"
        shown = "stalls" if r["stalled"] else f"{r['simulated_ms']:,.2f}"
        table.add_row(
            r["what"],
            r["layout"],
            f"{r['n_devices']:,}",
            shown,
            f"{r['closed_form_ms']:,.2f}",
            busy,
            f"{r['waiting']:.1%}",
        )
    console.print(table)
    for r in rows:
        if (s := r["stalled"]) is not None:
            console.print(
                f"{r['what']}: stage {s['stage']}, EP group {s['group']} (devices "
                f"{s['devices'][0]} to {s['devices'][1] - 1}) never finishes; "
                f"{s['n_waiting']:,} of {r['n_devices']:,} devices wait"
            )
    console.print("modelled: every duration comes from the time model, none was measured")


def print_memory_terms(terms: Mapping[str, int], available: int, free: int) -> None:
    """Print what one rank holds, largest first."""
    table = Table("one rank", "GB")
    for name, n in sorted(terms.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{n / GB:.2f}")
    table.add_row("free for context", f"{free / GB:.2f}")
    table.add_row("usable", f"{available / GB:.2f}")
    new_console().print(table)


def print_comparison(model: str, context: int, ours: TokenCost, theirs: TokenCost) -> None:
    """Print where FLOPs and bytes of one token come from, and their ratio to V3.2's."""
    console = new_console()
    table = Table("one decoded token", "part", "GFLOP", "x FP8", "GFLOP in FP8")
    for name, cost in ((model, ours), ("v3.2", theirs)):
        for part, (n, weight) in cost.flops.items():
            table.add_row(name, part, f"{n / 1e9:,.1f}", f"{weight:g}", f"{n * weight / 1e9:,.1f}")
        table.add_row(name, "all", "", "", f"{cost.fp8_flops / 1e9:,.1f}")
    console.print(table)
    console.print(
        f"at {context:,} tokens {model} takes {ours.fp8_flops / theirs.fp8_flops:.1%} of the FLOPs "
        f"and {ours.bytes_per_token / theirs.bytes_per_token:.1%} of the cache of V3.2 "
        f"({ours.bytes_per_token:,.2f} and {theirs.bytes_per_token:,.0f} bytes a token)"
    )
