"""Find the first operator two traced runs disagree in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from v4_ascend.errors import ConfigError
from v4_ascend.runtime.compare import Bounds, Record, relative_error

GATES = ("topk_gate", "hash_gate")


@dataclass(frozen=True)
class Divergence:
    """One operator call whose outputs differ though those before it agreed.

    Attributes:
        start: the first token of its step; `token` counts rows of the output from there.
        call: which operator call of the layer it is.
        error: relative, or the fraction of rows with other ids or bytes, as `measure` says.
        before: the largest such error of a call before it.
    """

    start: int
    layer: int
    call: int
    op: str
    output: int
    row: int
    error: float
    bound: float
    measure: str
    before: float

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return asdict(self)


def bisect(a: Record, b: Record, bounds: Bounds) -> Divergence | None:
    """Walk both traces in order of execution; return the first call out of bounds.

    Raises:
        ConfigError: a record has no trace, or they are of other steps.
    """
    for record in (a, b):
        if not record.traced:
            raise ConfigError(str(record.path), "has no trace: record it with --trace")
    if a.metadata["mode"] != b.metadata["mode"]:
        modes = f"{b.metadata['mode']}, {a.path} in {a.metadata['mode']}"
        raise ConfigError(str(b.path), f"was run in {modes}: traces of other steps")
    calls = [n for n in a.traced if not n.endswith("/streams")]
    theirs = {n for n in b.traced if not n.endswith("/streams")}
    before, is_reordered = 0.0, False
    for name in calls:
        step, layer, what = name.split("/")[1:]
        number, op, output = what.split(".")
        if name not in theirs:
            raise ConfigError(str(b.path), f"has no {name}: the runs made other calls")
        # One token sent to another expert, which a rounded run may do, shifts the rows of all
        # experts behind it: they can be compared again once each token's sum is back.
        is_reordered = is_reordered and op != "moe_combine"
        if is_reordered:
            continue
        error, bound, row, measure = _error(a.tensor(name), b.tensor(name), bounds, before)
        is_reordered = op in GATES and error > 0 and measure != "relative error"
        if error > bound:
            place = (int(step), int(layer), int(number))
            return Divergence(*place, op, int(output), row, error, bound, measure, before)
        if measure == "relative error":
            before = max(before, error)
    if more := theirs.difference(calls):
        raise ConfigError(str(a.path), f"has no {min(more)}: the runs made other calls")
    return None


def _error(
    x: torch.Tensor, y: torch.Tensor, bounds: Bounds, before: float
) -> tuple[float, float, int, str]:
    """Return error, bound, the worst row, and what the error is."""
    if x.shape != y.shape:
        return float("inf"), 0.0, 0, f"shape {list(y.shape)}, was {list(x.shape)}"
    if not x.numel():
        return 0.0, bounds.op, 0, "relative error"
    if x.dtype.is_floating_point and x.dtype != torch.float8_e8m0fnu:
        error = relative_error(x.reshape(len(x), -1), y.reshape(len(y), -1))
        # Single flips move the worst row of a rounded run, and hardly the mean.
        typical = error.max() if bounds.other_rows == 0 else error.clamp_max(2.0).mean()
        bound = max(bounds.op, bounds.jump * before)
        return float(typical), bound, int(error.argmax()), "relative error"
    other = (_plain(x) != _plain(y)).view(len(x), -1)
    # A row's ids are chosen together; packed values and scales are rounded each by itself.
    is_choice = x.dtype in (torch.int32, torch.int64)
    rows = other.any(-1).double() if is_choice else other.double().mean(-1)
    bound = max(bounds.other_rows, bounds.jump * before)
    return float(rows.mean()), bound, int(rows.argmax()), "fraction that differs"


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8) if x.dtype.itemsize == 1 else x
