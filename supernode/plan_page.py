"""A plan as one page that needs nothing else: for whoever pays, and whoever starts it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

MAX_CELLS = 512  # beyond it, the map has a cell for each host
MAX_HOSTS = 1024
CELL, GAP, PER_ROW = 14, 3, 8
HATCHED = "repeating-linear-gradient(45deg, #8884 0 2px, transparent 2px 6px)"


def page(report: Mapping[str, Any]) -> str:
    """Render ``plan.html`` from what `report.report` gathered."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"gb": _gb, "n": _number}
    text = files("v4_ascend.supernode").joinpath("plan_page.html").read_text(encoding="utf-8")
    pools = [dict(pool) | {"map": _map(pool), "bars": _bars(pool)} for pool in report["pools"]]
    return environment.from_string(text).render(r=report, pools=pools)


def _gb(n: float) -> str:
    return f"{n / 1e9:,.2f}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 or isinstance(x, int) else f"{x:,.1f}"


def _colour(stage: int, n_stages: int) -> str:
    return f"hsl({int(360 * stage / max(n_stages, 1) + 210) % 360} 60% 55%)"


def _map(pool: Mapping[str, Any]) -> dict[str, Any]:
    """Lay devices out as hosts in rows; a cell is a device, or a host where there are many."""
    chosen = pool["chosen"]
    if chosen is None:
        return {"cells": [], "width": 0, "height": 0, "legend": [], "unit": "device"}
    per_host = pool["devices_per_host"]
    by_host = pool["n_devices"] > MAX_CELLS
    n_hosts = len(pool["hosts"])
    scale = max(1, -(-n_hosts // MAX_HOSTS)) if by_host else 1
    step = per_host * scale if by_host else 1
    stage_size, ep = chosen["stages"][0]["n_devices"], chosen["parallel"]["ep_size"]
    n_stages = len(chosen["stages"])
    per_row = 32 if by_host else per_host * max(1, PER_ROW // per_host) * 2
    cells = []
    for i, device in enumerate(range(0, pool["n_devices"], step)):
        used = device < chosen["n_used"]
        stage, group = device // stage_size, device % stage_size // ep
        row, column = divmod(i, per_row)
        gap = 0 if by_host else column // per_host * 2 * GAP
        where = f"{pool['hosts'][device // per_host]}"
        what = f"stage {stage}, EP group {group}" if used else "idle"
        cells.append(
            {
                "x": column * (CELL + GAP) + gap,
                "y": row * (CELL + GAP),
                "colour": _colour(stage, n_stages) if used else None,
                "is_odd": used and group % 2 == 1,
                "title": f"{where}, device {device % per_host}: {what}",
            }
        )
    rows = -(-len(cells) // per_row)
    return {
        "cells": cells,
        "width": per_row * (CELL + GAP) + per_row // per_host * 2 * GAP,
        "height": rows * (CELL + GAP),
        "unit": f"{scale} host{'s' if scale > 1 else ''}" if by_host else "device",
        "legend": [
            {"colour": _colour(i, n_stages), "stage": i, "layers": s["layers"]}
            for i, s in enumerate(chosen["stages"])
        ],
    }


def _bars(pool: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut each stage's memory into parts of the device, largest terms first."""
    if pool["chosen"] is None:
        return []
    bars = []
    for i, stage in enumerate(pool["chosen"]["stages"]):
        terms = sorted(stage["memory"].items(), key=lambda t: -t[1])
        parts = [*terms, ("one full-length request", stage["context_bytes"])]
        left = stage["available"] - sum(n for _, n in parts)
        parts += [
            ("left for more requests", left),
            ("kept free", stage["device_memory"] - stage["available"]),
        ]
        x, drawn = 0.0, []
        for j, (name, n) in enumerate(parts):
            width = 100 * n / stage["device_memory"]
            colour = {"left for more requests": "#8882", "kept free": HATCHED}.get(
                name, f"hsl({(37 * j + 200) % 360} 55% 55%)"
            )
            drawn.append({"name": name, "bytes": n, "x": x, "width": width, "colour": colour})
            x += width
        bars.append({"stage": i, "layers": stage["layers"], "parts": drawn, "of": stage})
    return bars
