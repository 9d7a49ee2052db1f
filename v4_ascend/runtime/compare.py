"""Compare two parity records: how far their logits are apart, and where they part.

What two honest runs may differ by depends on what they round. In fp32 without simulation
only the order of sums is free. With bf16 or simulated FP8/FP4 a value near a tie rounds the
other way now and then, and one such flip can send a token to another expert: single
positions are far off in a run that is right, the median is not.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from v4_ascend.errors import ConfigError

# What the commands read of a record's metadata.
NEEDED = ("dtype", "quant_sim", "mode", "checkpoint_digest", "input_ids_digest")
TRACED = re.compile(r"trace/\d+/\d+/(streams|\d+\.\w+\.\d+)")
NEAR_TIE = 1e-3  # top-1 gap of logits below which greedy decoding may choose otherwise


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is called equal. Errors are norms of differences over norms.

    Attributes:
        median, worst: of the logits' relative error over all positions.
        op: of one operator's output.
        jump: times an operator's error may exceed the largest before it, however large.
        other_rows: fraction of rows in which ids or bytes may differ.
    """

    median: float
    worst: float
    op: float
    jump: float
    other_rows: float


EXACT = Bounds(median=1e-4, worst=1e-3, op=1e-3, jump=0.0, other_rows=0.0)
# A tiny model with random weights, in bf16 with simulation, amplifies roundings to a median
# of 0.12 between backends that agree to 1e-6 without; trained weights amplify less.
ROUNDED = Bounds(median=0.25, worst=2.0, op=0.05, jump=10.0, other_rows=0.1)
# What a conversion may move the logits of a tiny model by, against its source: INT8 drops the
# simulation of FP8 inputs and caches the source has, which alone moves them by a median of 0.12.
CONVERTED = {
    "w8a8": Bounds(median=0.25, worst=2.0, op=0.05, jump=10.0, other_rows=0.1),
    "w4a8": Bounds(median=0.4, worst=2.0, op=0.05, jump=10.0, other_rows=0.1),
}


class Record:
    """A record opened for reading; tensors are read one by one."""

    def __init__(self, file: Path) -> None:
        try:
            self._file = safe_open(str(file), framework="pt")
        except (OSError, SafetensorError) as e:
            raise ConfigError(str(file), f"cannot be read as safetensors: {e}") from e
        self.path = file
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.names = list(self._file.keys())
        if why := self._why_none():
            raise ConfigError(str(file), f"is not what v4-ascend parity record writes: {why}")

    def _why_none(self) -> str | None:
        if "logits" not in self.names:
            return "it has no logits"
        if missing := [key for key in NEEDED if key not in self.metadata]:
            return f"its metadata has no {', '.join(missing)}"
        if odd := next((n for n in self.traced if not TRACED.fullmatch(n)), None):
            return f"{odd} is no name of a trace"
        logits = self._file.get_slice("logits")
        shape, dtype = logits.get_shape(), logits.get_dtype()
        if dtype != "F32" or len(shape) != 3 or 0 in shape or shape[-1] < 2:
            return f"logits are {dtype} {shape}, must be F32 [n, s, vocab_size]"
        return None

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return self._file.get_tensor(name)

    @property
    def traced(self) -> list[str]:
        """Return the names of traced tensors, in order of execution."""
        return sorted((n for n in self.names if n.startswith("trace/")), key=_execution)

    @property
    def streams(self) -> dict[int, list[str]]:
        """Return the names of what left each traced layer, step by step."""
        by_layer: dict[int, list[str]] = {}
        for name in self.traced:
            if name.endswith("/streams"):
                by_layer.setdefault(int(name.split("/")[2]), []).append(name)
        return by_layer

    def is_converted_from(self, other: Record) -> bool:
        """Whether this run's checkpoint was made by `convert` of the other's."""
        return self.metadata.get("source_digest") == other.metadata["checkpoint_digest"]

    @property
    def is_exact(self) -> bool:
        """Whether nothing in this run was rounded below fp32."""
        return self.metadata["dtype"] == "fp32" and self.metadata["quant_sim"] == "off"


def _execution(name: str) -> tuple[str, str]:
    place, _, what = name.rpartition("/")
    return place, "~" if what == "streams" else what


def open_pair(a: Path, b: Path) -> tuple[Record, Record, Bounds]:
    """Open two records of the same tokens.

    Raises:
        ConfigError: not two records, or of other tokens, shapes or weights; one may be of what
            `convert` made of the other's checkpoint.
    """
    one, two = Record(a), Record(b)
    converted = [r for r, other in ((one, two), (two, one)) if r.is_converted_from(other)]
    for key, what in (("input_ids_digest", "tokens"), ("checkpoint_digest", "checkpoints")):
        if what == "checkpoints" and converted:
            continue
        if one.metadata[key] != two.metadata[key]:
            raise ConfigError(
                str(b),
                f"is of other {what} than {a} ({key} {two.metadata[key][:12]}, "
                f"there {one.metadata[key][:12]})",
            )
    formats = [r.metadata["format"] for r in converted]
    if formats and formats[0] in CONVERTED:
        return one, two, CONVERTED[formats[0]]
    return one, two, EXACT if one.is_exact and two.is_exact else ROUNDED


@dataclass(frozen=True, slots=True)
class LayerDrift:
    """How far the streams behind one layer are apart, over all steps."""

    layer: int
    median: float
    worst: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        max_abs: largest difference of two logits.
        median_error, worst_error: of each position's relative error.
        kl_mean, kl_max: KL(A || B) in nats, of the softmax at each position.
        top1: positions whose most likely token is the same, of `positions`.
        top1_clear: the same, where A's top-1 gap exceeds NEAR_TIE, of `positions_clear`.
        first: (sequence, position) of the first error above the worst bound; None if none is.
    """

    positions: int
    max_abs: float
    median_error: float
    worst_error: float
    kl_mean: float
    kl_max: float
    top1: int
    top1_clear: int
    positions_clear: int
    first: tuple[int, int] | None
    bounds: Bounds
    differences: dict[str, tuple[str, str]]
    layers: list[LayerDrift] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Return what is out of bounds, a sentence each."""
        b, out = self.bounds, []
        if not self.median_error <= b.median:
            out.append(f"median error {self.median_error:.3g} exceeds {b.median:g}")
        if not self.worst_error <= b.worst:
            out.append(f"worst error {self.worst_error:.3g} exceeds {b.worst:g}")
        if b == EXACT and self.top1_clear < self.positions_clear:
            n = self.positions_clear - self.top1_clear
            out.append(f"{n} positions choose another token although the gap exceeds {NEAR_TIE:g}")
        return out

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return asdict(self) | {"problems": self.problems}


def compare(a: Record, b: Record, bounds: Bounds) -> Comparison:
    """Compare logits [n, s, vocab], and layers where both were traced.

    Raises:
        ConfigError: the logits, or the streams behind a layer, have other shapes.
    """
    x, y = a.tensor("logits").double(), b.tensor("logits").double()
    if x.shape != y.shape:
        raise ConfigError(str(b.path), f"logits {list(y.shape)}, {a.path} has {list(x.shape)}")
    error = relative_error(x.flatten(0, 1), y.flatten(0, 1)).view(x.shape[:2])
    # Unlike scores of hidden rows, no logit may be infinite, however well both agree on it.
    error[~(x.isfinite() & y.isfinite()).all(-1)] = float("inf")
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
    top = x.topk(2, dim=-1)
    same = top.indices[..., 0] == y.argmax(-1)
    clear = top.values[..., 0] - top.values[..., 1] > NEAR_TIE
    beyond = (~(error <= bounds.worst)).nonzero()
    keys = sorted(set(a.metadata) | set(b.metadata))
    pairs = {k: (a.metadata.get(k, ""), b.metadata.get(k, "")) for k in keys}
    return Comparison(
        positions=error.numel(),
        max_abs=float((x - y).abs().max()),
        median_error=float(error.median()),
        worst_error=float(error.max()),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=int(same.sum()),
        top1_clear=int((same & clear).sum()),
        positions_clear=int(clear.sum()),
        first=(int(beyond[0, 0]), int(beyond[0, 1])) if len(beyond) else None,
        bounds=bounds,
        differences={k: v for k, v in pairs.items() if v[0] != v[1]},
        layers=_drift(a, b),
    )


def relative_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Error of each row of y against x: norm of the difference over norm of x; NaN is infinite."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    # Where both say -inf (hidden rows) they agree.
    same = x == y
    difference = torch.where(same, 0.0, x - y)
    norm = torch.where(x.isinf() & same, 0.0, x).norm(dim=-1)
    error = difference.norm(dim=-1) / norm.clamp_min(1e-30)
    return torch.where(difference.norm(dim=-1) == 0, 0.0, error).nan_to_num(nan=float("inf"))


def _drift(a: Record, b: Record) -> list[LayerDrift]:
    drift = []
    ours, theirs = a.streams, b.streams
    for layer in sorted(set(ours) & set(theirs)):
        x, y = _joined(a, ours[layer]), _joined(b, theirs[layer])
        if x.shape != y.shape:
            has = f"{list(y.shape)} behind layer {layer}, {a.path} has {list(x.shape)}"
            raise ConfigError(str(b.path), f"streams {has}")
        error = relative_error(x, y)
        drift.append(LayerDrift(layer, float(error.median()), float(error.max())))
    return drift


def _joined(record: Record, names: list[str]) -> torch.Tensor:
    """Join steps: two runs may cut the same tokens into other chunks."""
    steps = [record.tensor(name) for name in names]
    odd = next(
        (n for n, s in zip(names, steps, strict=True) if s.shape[1:] != steps[0].shape[1:]), ""
    )
    if odd:
        raise ConfigError(str(record.path), f"{odd} has other widths than {names[0]}")
    return torch.cat(steps)
