"""What laying out, converting and reading a checkpoint cost here, in time and memory.

Every command runs as a process of its own, as people run it, and says itself what memory it had.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.errors import ConfigError, ShardError

FORMATS = ("fp8", "mxfp8", "bf16", "w8a8", "w4a8")
# The system's count for a child would begin with the memory of the process it was forked from.
CHILD = """import pathlib, sys
from v4_ascend.cli import main
try:
    main()
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    print(status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""
RAW = "raw read"  # as `bench load` names it


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One command: bytes of the checkpoint per second, and that by the rate it is compared with."""

    what: str
    bytes_per_s: float
    ratio: float | None
    against: str
    peak_bytes: int


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """All commands on one machine."""

    date: str
    machine: str
    workers: int
    nbytes: int
    costs: tuple[Cost, ...]


def measured(
    checkpoint: Path,
    plan: Path,
    scratch: Path,
    *,
    rounds: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> Costs:
    """Run every command on the checkpoint; what they write below `scratch` is removed again.

    Raises:
        ConfigError: `scratch` is no folder.
        ShardError: a command failed, with what it said.
    """
    if not scratch.is_dir():
        raise ConfigError("--scratch", f"{scratch} is no folder")
    done = 0

    def run(*words: str | Path | int) -> tuple[dict[str, Any], int]:
        nonlocal done
        told = _run(words)
        done += 1
        progress(done, len(FORMATS) + 5)
        return told

    costs = tuple(_all(run, checkpoint, plan, scratch, ("--rounds", rounds), workers))
    return Costs(
        date=datetime.date.today().isoformat(),
        machine=_machine(),
        workers=workers,
        nbytes=sum(h.nbytes for h in CheckpointFolder(checkpoint).headers.values()),
        costs=costs,
    )


def table(found: Costs) -> str:
    """Return the costs as a table in Markdown."""
    lines = [
        f"{found.nbytes:,} bytes, {found.workers} workers, {found.machine}, {found.date}:",
        "",
        "| command | GB/s | ratio | to | most memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for c in found.costs:
        ratio = "" if c.ratio is None else f"{c.ratio:.2f}"
        rate = f"{c.bytes_per_s / 1e9:.2f}"
        lines.append(f"| {c.what} | {rate} | {ratio} | {c.against} | {c.peak_bytes / 2**20:,.0f} |")
    return "\n".join(lines)


def _all(
    run: Callable[..., tuple[dict[str, Any], int]],
    checkpoint: Path,
    plan: Path,
    scratch: Path,
    rounds: Sequence[str | int],
    workers: int,
) -> Iterator[Cost]:
    how = ("--workers", workers, "--json")
    place = ("--checkpoint", checkpoint, "--scratch", scratch)

    def peak_of(*words: str | Path) -> int:
        with tempfile.TemporaryDirectory(dir=scratch) as work:
            return run(*words, "--out", Path(work) / "out", *how)[1]

    rates = run("bench", "shard", *place, "--plan", plan, *rounds, *how)[0]["bytes_per_s"]
    peak = peak_of("shard", checkpoint, "--plan", plan)
    for other in ("cp", "cp and fsync"):
        yield _cost("shard", rates["shard"], other, rates[other], peak)
    rates = run("bench", "convert", *place, *rounds, *how)[0]["bytes_per_s"]
    for name in FORMATS:
        peak = peak_of("convert", checkpoint, "--to", name)
        script = "the official script's arithmetic, FP4 to FP8"
        yield _cost(f"convert --to {name}", rates[name], script, rates.get("plain"), peak)
    for state, option in (("cold", ()), ("warm", ("--warm",))):
        words = ("bench", "load", "--checkpoint", checkpoint, *rounds, *option, "--json")
        said, peak = run(*words)
        first, raw = next(iter(said["bytes_per_s"].values())), said["bytes_per_s"][RAW]
        yield _cost(f"reading for a load, {state}", first, f"the raw read, {state}", raw, peak)


def _cost(what: str, rate: float, against: str, other: float | None, peak: int) -> Cost:
    ratio = rate / other if other else None
    return Cost(what=what, bytes_per_s=rate, ratio=ratio, against=against, peak_bytes=peak)


def _run(words: Sequence[str | Path | int]) -> tuple[dict[str, Any], int]:
    """Run a command with `--json`; return its data, and the most memory it had."""
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *logged, kib = done.stderr.strip().splitlines() or [""]
    if done.returncode:
        what = " ".join(map(str, words))
        raise ShardError(f"{what}: exit code {done.returncode}: {''.join(logged[-1:])}")
    return json.loads(done.stdout)["data"], int(kib) * 1024


def _machine() -> str:
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    return f"{cpu}, {os.cpu_count()} cores"
