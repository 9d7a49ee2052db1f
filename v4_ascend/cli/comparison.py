"""What `parity compare` and `parity bisect` print."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from v4_ascend.runtime.bisect import Divergence
from v4_ascend.runtime.compare import NEAR_TIE, Comparison


def print_comparison(a: Path, b: Path, found: Comparison) -> None:
    """Print figures, what the two runs differ in, layers, and the verdict."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{b} against {a}: {found.positions:,} positions", style="bold")
    table = Table("what", "value", "at most")
    table.add_row("relative error, median", f"{found.median_error:.3g}", f"{found.bounds.median:g}")
    table.add_row("relative error, worst", f"{found.worst_error:.3g}", f"{found.bounds.worst:g}")
    table.add_row("largest difference of a logit", f"{found.max_abs:.3g}", "")
    table.add_row("KL in nats, mean and max", f"{found.kl_mean:.3g}, {found.kl_max:.3g}", "")
    table.add_row("same top-1", f"{found.top1:,} of {found.positions:,}", "")
    clear = f"{found.top1_clear:,} of {found.positions_clear:,}"
    table.add_row(f"same top-1 where its gap exceeds {NEAR_TIE:g}", clear, "")
    console.print(table)
    for key, (one, two) in found.differences.items():
        console.print(f"{key}: {one or 'nothing'} | {two or 'nothing'}")
    if found.layers:
        drift = Table("layer", "median error of the streams", "worst")
        for layer in found.layers:
            drift.add_row(str(layer.layer), f"{layer.median:.3g}", f"{layer.worst:.3g}")
        console.print(drift)
    if found.first is not None:
        sequence, position = found.first
        console.print(f"first beyond the worst bound: sequence {sequence}, position {position}")
    for problem in found.problems:
        console.print(problem, style="red")
    console.print("they agree" if not found.problems else "they do not agree")


def divergence_lines(found: Divergence) -> list[str]:
    """Say where two runs part, in lines."""
    where = f"layer {found.layer}, {found.op} (operator call {found.call} of the layer)"
    return [
        f"first out of bounds: {where}",
        f"  step from token {found.start}, output {found.output}, worst in row {found.row}",
        f"  {found.measure} {found.error:.3g}, at most {found.bound:g}",
        f"  before it, no operator was further than {found.before:.3g}",
    ]
