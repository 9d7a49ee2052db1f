"""Whether we have become slower: ``python tests/ratios.py [NAME ...]``, on an idle machine.

Every figure is a ratio of two things timed in one run, so that it holds on other machines too:
against transformers, against `cp`, against a read of the same bytes, against the arithmetic of
DeepSeek's converter. Each has a least value, below which it exits with 1. Measured ones are in the
documents that name the command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "v4_ascend"]
AGAINST = ["--against", "transformers"]


@dataclass(frozen=True)
class Ratio:
    """What `bench` is asked, what of its answer counts, and what it must not fall below."""

    what: str
    preset: tuple[str, ...]  # the options of `init`
    bench: tuple[str, ...]
    of: Callable[[dict[str, Any]], float]
    least: float


def of_sides(data):
    """Ours over the others, tokens per second."""
    ours, *others = (
        side["tokens_per_s"] if isinstance(side, dict) else side
        for side in data.get("sides", data.get("tokens_per_s")).values()
    )
    return ours / others[0]


def of_bytes(ours, theirs):
    """Bytes per second of one way over another's."""
    return lambda data: data["bytes_per_s"][ours] / data["bytes_per_s"][theirs]


def of_floor(data):
    """Ours over what the machine could do at the rates measured beside it."""
    (ours,) = data["tokens_per_s"].values()
    return ours / data["floor"]


TINY = ("--preset", "tiny", "--format", "fp32")
WIDE = ("--preset", "wide", "--format", "fp8")
BEHIND_2K = ("--prompt", "2048", "--chunk", "2048", "--rounds", "3")
RATIOS = {
    "prefill": Ratio("of transformers", TINY, ("prefill", *AGAINST), of_sides, 1.2),
    "decode": Ratio("of transformers", TINY, ("decode", *AGAINST), of_sides, 8.0),
    "batch": Ratio("of transformers", TINY, ("decode", "--batch", "8", *AGAINST), of_sides, 3.0),
    "prefill-floor": Ratio("of the floor", WIDE, ("prefill", *BEHIND_2K), of_floor, 0.5),
    "decode-floor": Ratio("of the floor", WIDE, ("decode", *BEHIND_2K), of_floor, 0.35),
    "generate": Ratio(
        "of transformers, prompt by prompt", TINY, ("generate", *AGAINST), of_sides, 5.0
    ),
    "load": Ratio(
        "of a read of the files from the disk",
        ("--preset", "ascend-slice"),
        ("load", "--rounds", "15"),  # a disk that others use too has its best rounds seldom
        of_bytes("tensors", "raw read"),
        0.9,
    ),
    "convert": Ratio(
        "of the official script's arithmetic, FP4 to FP8",
        ("--preset", "ascend-slice"),
        ("convert", "--to", "fp8", "--scratch", "{folder}"),
        of_bytes("fp8", "plain"),
        10.0,
    ),
}


def measure(ratio: Ratio, folder: Path) -> float:
    """Run one and return its figure."""
    checkpoint = folder / "-".join(ratio.preset).replace("--", "")
    if not checkpoint.exists():
        subprocess.run([*COMMAND, "init", *ratio.preset, "--out", str(checkpoint)], check=True)
    words = [word.format(folder=folder) for word in ratio.bench]
    command = [*COMMAND, "bench", *words, "--checkpoint", str(checkpoint), "--json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return ratio.of(json.loads(out.splitlines()[-1])["data"])


def table(found: dict[str, float]):
    """Yield lines for people."""
    yield "| bench | ratio | | at least |"
    yield "|---|---|---|---|"
    for name, value in found.items():
        ratio = RATIOS[name]
        mark = "" if value >= ratio.least else " **slower**"
        yield f"| {name} | {value:.2f}{mark} | {ratio.what} | {ratio.least:g} |"


def main() -> bool:
    """Measure, print, and say whether one has fallen."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RATIOS))
    names = parser.parse_args().names or list(RATIOS)
    if odd := sorted(set(names) - set(RATIOS)):
        parser.error(f"no ratio {odd[0]!r}; there is {', '.join(RATIOS)}")
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(RATIOS[name], Path(folder)) for name in names}
    sys.stdout.writelines(f"{line}\n" for line in table(found))
    return any(value < RATIOS[name].least for name, value in found.items())


if __name__ == "__main__":
    raise SystemExit(main())
