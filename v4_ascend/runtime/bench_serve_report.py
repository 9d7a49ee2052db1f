"""What a load came to: the keys of `vllm bench serve`'s result, and a page with curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from v4_ascend.runtime.bench_serve import Load, Measured

PERCENTILES = (50, 90, 99)
WIDTH, HEIGHT = 640, 220  # of a plot, in its own units


def result_of(
    measured: Sequence[Measured],
    seconds: float,
    *,
    model: str,
    load: Load,
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """Return the result; times in ms, and in the lists of each request in seconds.

    TPOT is of requests with more than one token. `goodput` has limits in ms for ttft, tpot and
    e2el; a request is good if it keeps all of them.
    """
    done = [m for m in measured if m.error is None]
    n_output = sum(m.n_output for m in done)
    n_input = sum(m.n_input for m in done)
    each = {
        "ttft": [m.ttft for m in done],
        "tpot": [m.tpot for m in done if m.n_output > 1],
        "itl": [gap for m in done for gap in m.itls],
        "e2el": [m.latency for m in done],
    }
    n_good = sum(_keeps(m, goodput) for m in done)
    out: dict[str, Any] = {
        "date": datetime.now().astimezone().strftime("%Y%m%d-%H%M%S"),
        "backend": "openai",
        "model_id": model,
        "num_prompts": len(measured),
        "request_rate": "inf" if load.rate is None else load.rate,
        "burstiness": 1.0,
        "max_concurrency": load.concurrency,
        "duration": seconds,
        "completed": len(done),
        "failed": len(measured) - len(done),
        "total_input_tokens": n_input,
        "total_output_tokens": n_output,
        "request_throughput": len(done) / seconds,
        "request_goodput": n_good / seconds if goodput else None,
        "output_throughput": n_output / seconds,
        "total_token_throughput": (n_input + n_output) / seconds,
        "input_lens": [m.n_input for m in measured],
        "output_lens": [m.n_output for m in measured],
        "ttfts": [m.ttft for m in measured],
        "itls": [m.itls for m in measured],
        "errors": [m.error or "" for m in measured],
    }
    for name, values in each.items():
        ms = 1000 * np.array(values or [float("nan")])
        out |= {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms))}
        out[f"std_{name}_ms"] = float(ms.std())
        out |= {f"p{p}_{name}_ms": float(np.percentile(ms, p)) for p in PERCENTILES}
    return out


def _keeps(m: Measured, limits_ms: Mapping[str, float]) -> bool:
    took = {"ttft": m.ttft, "tpot": m.tpot, "e2el": m.latency}
    return all(1000 * took[name] <= limit for name, limit in limits_ms.items())


def write_page(file: Path, result: Mapping[str, Any], measured: Sequence[Measured]) -> None:
    """Write a page that needs nothing from a network."""
    done = [m for m in measured if m.error is None]
    plots = [
        ("Time to first token, ms", _share([1000 * m.ttft for m in done])),
        ("Time per output token, ms", _share([1000 * m.tpot for m in done if m.n_output > 1])),
        ("Between pieces of text, ms", _share([1000 * gap for m in done for gap in m.itls])),
        ("Pieces of text per second, over time in s", _rate([t for m in done for t in m.pieces])),
    ]
    drawn = [{"title": title, **_plot(*curve)} for title, curve in plots if len(curve[0]) > 1]
    template = (files("v4_ascend.runtime") / "bench_serve.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    file.write_text(
        page.render(result=result, plots=drawn, width=WIDTH, height=HEIGHT), encoding="utf-8"
    )


Curve = tuple[np.ndarray, np.ndarray]


def _share(values: Sequence[float]) -> Curve:
    """Return the share of requests, in %, that took at most so long."""
    x = np.sort(np.array(values))
    return x, 100 * np.arange(1, len(x) + 1) / max(1, len(x))


def _rate(times: Sequence[float]) -> Curve:
    counts = np.bincount(np.array(times, dtype=np.int64)) if times else np.zeros(0)
    return np.arange(len(counts)), counts


def _plot(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Return an SVG polyline, and the ends of its axes."""
    step = max(1, len(x) // 400)
    right, top = float(x.max()) or 1.0, float(y.max()) or 1.0
    points = [
        f"{WIDTH * a / right:.1f},{HEIGHT - HEIGHT * b / top:.1f}"
        for a, b in zip(x[::step], y[::step], strict=True)
    ]
    return {"points": " ".join(points), "right": f"{right:.4g}", "top": f"{top:.4g}"}
