"""Everything a plan says, as plain data: for --json, the table and the page."""

from __future__ import annotations

from datetime import date
from typing import Any

from v4_ascend import __version__
from v4_ascend.config.devices import Figure
from v4_ascend.config.topology import Topology
from v4_ascend.supernode.calibration import calibration
from v4_ascend.supernode.memory import overheads
from v4_ascend.supernode.plan import Plan
from v4_ascend.supernode.planning import (
    PlannedModel,
    PoolPlan,
    layout_name,
    plan_for,
    with_one_more_host,
)
from v4_ascend.supernode.rules import Candidate, notes
from v4_ascend.supernode.search import Choice
from v4_ascend.supernode.weights import model_bytes

N_ALTERNATIVES = 4


def report(
    topology: Topology, model: PlannedModel, pools: tuple[PoolPlan, ...], *, grow: bool = True
) -> dict[str, Any]:
    """Gather the facts of a plan; `grow` also says what one more host would buy."""
    t, first = topology, pools[0].search
    plan = _plan(t, pools)
    return {
        "name": t.name,
        "digest": plan.digest if plan else None,
        "generated": date.today().isoformat(),
        "version": __version__,
        "model": {
            "name": model.name,
            "source": model.source,
            "weight_bytes": model_bytes(model.config, first.serving.weight_format),
            "weight_format": first.serving.weight_format,
            "n_layers": model.config.n_layers,
            "n_routed_experts": model.config.n_routed_experts,
        },
        "serve": {
            "max_model_len": t.serve.max_model_len,
            "concurrency": t.serve.concurrency,
            "objective": t.serve.objective,
            "engine": t.engine,
            "input_tokens": first.demand.workload.input_tokens,
            "output_tokens": first.demand.workload.output_tokens,
            "slo": t.serve.slo.model_dump(),
        },
        "pools": [_pool(p, grow=grow) for p in pools],
        "assumptions": _assumptions(pools),
    }


def _plan(t: Topology, pools: tuple[PoolPlan, ...]) -> Plan | None:
    return plan_for(t, pools[0]) if pools[0].chosen else None


def _pool(pool: PoolPlan, *, grow: bool) -> dict[str, Any]:
    s, choices = pool.system, pool.found.choices
    return {
        "role": s.role,
        "device": s.profile.name,
        "n_devices": s.n_devices,
        "hosts": list(s.hosts),
        "devices_per_host": s.devices_per_host,
        "levels": [
            {
                "name": name,
                "n_devices": level.n_devices,
                **_figure(level.bytes_per_s, "bytes_per_s"),
            }
            for name, level in s.levels
        ],
        "n_judged": pool.found.n_judged,
        "n_legal": len(choices),
        "chosen": _choice(pool, choices[0], "best for the objective") if choices else None,
        "alternatives": [
            _choice(pool, c, _trade_off(pool, choices[0], c))
            for c in choices[1 : 1 + N_ALTERNATIVES]
        ],
        "one_more_host": _one_more(pool) if grow and choices else None,
        "rejected": [
            {
                "rule": r.rule.id,
                "code": r.rule.code,
                "text": r.rule.text,
                "source": r.rule.source,
                "date": r.rule.date,
                "count": r.count,
                "examples": [
                    {"layout": layout_name(p), "numbers": numbers} for p, numbers in r.examples
                ],
            }
            for r in pool.found.rejected
        ],
        "notes": _notes(pool),
    }


def _choice(pool: PoolPlan, c: Choice, trade_off: str) -> dict[str, Any]:
    serving, p = pool.search.serving, c.parallel
    blocks = -(-serving.max_model_len // 128)
    return {
        "layout": layout_name(p),
        "parallel": p.model_dump(),
        "n_used": p.world_size,
        "n_idle": c.n_idle,
        "batch_per_dp": c.batch,
        "meets_slo": c.meets_slo,
        "stages": [
            {
                "layers": list(layers),
                "first_device": i * p.stage_size,
                "n_devices": p.stage_size,
                "n_local_experts": pool.search.memory.local_experts(p),
                "memory": memory.terms,
                "context_bytes": blocks * memory.per_block,
                "available": memory.available,
                "device_memory": int(pool.system.profile.memory_bytes.value),
                "n_full_requests": memory.n_requests(serving.max_model_len),
                "binding_term": memory.binding_term,
            }
            for i, (layers, memory) in enumerate(zip(c.layers, c.memory, strict=True))
        ],
        "figures": _figures(pool, c),
        "max_context": min(c.max_context, pool.search.config.max_seq_len),
        "full_requests": c.n_full(serving.max_model_len),
        "step": [{"part": n, "ms": 1e3 * s} for n, s in c.predicted.step.parts.items()],
        "trade_off": trade_off,
    }


def _figures(pool: PoolPlan, c: Choice) -> list[dict[str, Any]]:
    worst = pool.search.predict(c.parallel, c.layers, c.batch, "low")
    best = pool.search.predict(c.parallel, c.layers, c.batch, "high")
    factor = calibration().interval
    figures = []
    for name, unit, attribute in (
        ("time per output token", "ms", "tpot_ms"),
        ("time to first token", "ms", "ttft_ms"),
        ("throughput", "tokens/s", "tokens_per_s"),
    ):
        if (name, pool.system.role) in (
            ("time per output token", "prefill"),
            ("time to first token", "decode"),
        ):
            continue
        ends = sorted(getattr(p, attribute) for p in (worst, best))
        figures.append(
            {
                "name": name,
                "unit": unit,
                "value": getattr(c.predicted, attribute),
                "low": ends[0] / factor,
                "high": ends[1] * factor,
                "label": "modelled",
            }
        )
    return figures


def _timed_as(pool: PoolPlan) -> str:
    return "time to first token" if pool.system.role == "prefill" else "time per token"


def _trade_off(pool: PoolPlan, best: Choice, c: Choice) -> str:
    said = []
    for name, mine, theirs, more_is in (
        ("tokens/s", c.predicted.tokens_per_s, best.predicted.tokens_per_s, "more"),
        (_timed_as(pool), c.predicted.time_ms, best.predicted.time_ms, "longer"),
        ("context", float(c.max_context), float(best.max_context), "more"),
        ("devices", float(c.parallel.world_size), float(best.parallel.world_size), "more"),
    ):
        change = mine / theirs - 1
        if abs(change) >= 0.01:
            word = more_is if change > 0 else {"more": "less", "longer": "shorter"}[more_is]
            said.append(f"{abs(change):.0%} {word} {name}")
    return ", ".join(said) or "as good"


def _one_more(pool: PoolPlan) -> str | None:
    grown, now = with_one_more_host(pool), pool.chosen
    if grown is None or now is None:
        return None
    before, after = now.predicted.tokens_per_s, grown.predicted.tokens_per_s
    n = len(pool.system.hosts) + 1
    ms, ms_before = grown.predicted.time_ms, now.predicted.time_ms
    return (
        f"{n} hosts: {layout_name(grown.parallel)}, {after:,.0f} tokens/s "
        f"({after / before - 1:+.0%}), {_timed_as(pool)} {ms:,.1f} ms ({ms - ms_before:+,.1f})"
    )


def _notes(pool: PoolPlan) -> list[dict[str, str]]:
    if pool.chosen is None:
        return []
    s = pool.search
    found = notes(Candidate(s.config, s.system, s.serving, pool.chosen.parallel), s.rules)
    return [
        {
            "rule": n.rule.id,
            "text": f"{n.rule.text}: {n.numbers}" if n.numbers else n.rule.text,
            "source": n.rule.source,
        }
        for n in found
    ]


def _assumptions(pools: tuple[PoolPlan, ...]) -> list[dict[str, str]]:
    rows = []
    for pool in pools:
        p = pool.system.profile
        for what, figure in (
            ("memory of a device, bytes", p.memory_bytes),
            ("memory bandwidth, bytes/s", p.memory_bytes_per_s),
            ("BF16, FLOP/s", p.bf16_flops),
            ("FP8, FLOP/s", p.fp8_flops),
            ("INT8, OP/s", p.int8_flops),
            *((f"{name} links, bytes/s", level.bytes_per_s) for name, level in pool.system.levels),
            *(
                (f"{o.term}, bytes ({o.date})", o.bytes)
                for o in overheads()
                if o.family == p.family
            ),
        ):
            if figure is not None:
                rows.append(_assumption(f"{p.name}: {what}", figure))
    rows += [_imbalance(pool) for pool in pools if pool.chosen]
    return list({row["what"]: row for row in rows}.values())


def _imbalance(pool: PoolPlan) -> dict[str, str]:
    load, parallel = pool.search.demand.expert_load, pool.found.choices[0].parallel
    return {
        "what": "busiest rank's routed tokens over the mean",
        "value": f"{pool.search.imbalance(parallel):.3g}",
        "label": "assumed" if load is None else "derived",
        "source": "no load trace was given"
        if load is None
        else f"{load.source}, {parallel.n_redundant_experts} copies of busy experts",
    }


def _assumption(what: str, figure: Figure) -> dict[str, str]:
    span = f" ({_spell(figure.low)} to {_spell(figure.high)})" if figure.low and figure.high else ""
    return {
        "what": what,
        "value": _spell(figure.value) + span,
        "label": figure.label,
        "source": figure.source,
    }


def _spell(x: float) -> str:
    """Write 3.22e12 as 3.22 T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if x >= size:
            return f"{x / size:.4g} {unit}"
    return f"{x:g}"


def _figure(figure: Figure, name: str) -> dict[str, Any]:
    return {
        name: figure.value,
        "low": figure.low or figure.value,
        "high": figure.high or figure.value,
        "label": figure.label,
        "source": figure.source,
    }
