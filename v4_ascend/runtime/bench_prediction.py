"""What a plan predicted of a deployment, beside what a load on it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from v4_ascend.errors import ConfigError

# The plan's names, and the keys of a result that measure the same.
MEASURED_BY = {
    "time per output token": "mean_tpot_ms",
    "time to first token": "mean_ttft_ms",
    "throughput": "output_throughput",
}


class Figure(msgspec.Struct, frozen=True):
    """A predicted figure and its interval, as ``report.json`` has them."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    label: str


class Parallel(msgspec.Struct, frozen=True):
    """Of a layout, how often it has the attention."""

    dp_size: int


class Chosen(msgspec.Struct, frozen=True):
    """A pool's layout."""

    layout: str
    parallel: Parallel
    n_used: int
    batch_per_dp: int
    figures: list[Figure]


class Pool(msgspec.Struct, frozen=True):
    """Devices of one role."""

    role: str
    chosen: Chosen | None


class Serve(msgspec.Struct, frozen=True):
    """The requests that were planned for, in tokens."""

    input_tokens: int
    output_tokens: int


class Report(msgspec.Struct, frozen=True):
    """Of a plan's ``report.json`` what a load can be compared with."""

    name: str
    serve: Serve
    pools: list[Pool]

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read it, from a folder that `plan --out` wrote or the file itself.

        Raises:
            ConfigError: it cannot be read, or is not such a report.
        """
        file = path / "report.json" if path.is_dir() else path
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except OSError as e:
            raise ConfigError(str(file), f"cannot be read: {e.strerror}; see plan --out") from e
        except msgspec.DecodeError as e:
            raise ConfigError(str(file), f"is not a report that plan --out wrote: {e}") from e


def compared(report: Report, result: Mapping[str, Any]) -> dict[str, Any]:
    """Put predictions beside a result of `bench serve`.

    A plan predicts a full batch of requests of one size; `load_differs` says in words where the
    load was another one, and nothing follows from the ratios then.
    """
    pools = [(p.role, p.chosen) for p in report.pools if p.chosen is not None]
    chosen = [c for _, c in pools]
    n_devices = sum(c.n_used for c in chosen)
    figures = []
    for role, figure in ((role, f) for role, c in pools for f in c.figures):
        if (role, figure.name) == ("prefill", "throughput"):
            continue  # of prompts, with devices of their own: nothing in a result measures it
        measured = result[MEASURED_BY[figure.name]]
        figures.append(
            {
                "name": figure.name,
                "unit": figure.unit,
                "predicted": figure.value,
                "low": figure.low,
                "high": figure.high,
                "label": figure.label,
                "measured": measured,
                "ratio": measured / figure.value,
                "is_inside": figure.low <= measured <= figure.high,
            }
        )
    return {
        "plan": report.name,
        "layout": [c.layout for c in chosen],
        "n_devices": n_devices,
        "output_throughput_per_device": result["output_throughput"] / n_devices,
        "figures": figures,
        "load_differs": _differences(report, chosen, result),
    }


def _differences(report: Report, chosen: Sequence[Chosen], result: Mapping[str, Any]) -> list[str]:
    serve = report.serve
    # The batch of a prefill pool is of prompts; requests run where tokens are drawn.
    batch = max(c.batch_per_dp * c.parallel.dp_size for c in chosen)
    found = []
    for what, planned, lengths in (
        ("prompt", serve.input_tokens, result["input_lens"]),
        ("answer", serve.output_tokens, result["output_lens"]),
    ):
        mean = sum(lengths) / max(1, len(lengths))
        if abs(mean - planned) > 0.1 * planned:
            found.append(f"{what}s of {mean:,.0f} tokens, {planned:,} were planned")
    at_a_time = result["max_concurrency"] or result["num_prompts"]
    if result["request_rate"] != "inf":
        found.append("requests came at a rate, a full batch was planned")
    elif abs(at_a_time - batch) > 0.1 * batch:
        found.append(f"{at_a_time:,} requests at a time, {batch:,} were planned")
    return found
