"""Fit the time model's four constants to published runs, and judge it on runs it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from v4_ascend.config.devices import WeightFormat, device_profile
from v4_ascend.config.load import Section, load_yaml
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.supernode.cost import Load
from v4_ascend.supernode.memory import MemoryModel, Serving
from v4_ascend.supernode.system import System
from v4_ascend.supernode.timing import Constants, TimeModel


class Row(Section):
    """One published decode run.

    Of a `bound` the source states what was to be kept, not what was reached: it is not fitted.
    """

    id: str
    kind: Literal["measured", "bound"] = "measured"
    device: str
    n_devices: int = Field(ge=1)
    model: str
    weight_format: WeightFormat
    batch: int = Field(ge=1)
    context: int = Field(ge=1)
    n_draft_tokens: int = Field(ge=0)
    accepted: float = Field(ge=0)
    ep_size: int = Field(ge=1)
    imbalance: float = Field(ge=1)
    tpot_ms: float = Field(gt=0)
    source: str


class FittedConstants(Section):
    """The fields of `Constants`."""

    memory_efficiency: float = Field(gt=0, le=1)
    cube_efficiency_950: float = Field(gt=0, le=1)
    cube_efficiency_910: float = Field(gt=0, le=1)
    kernel_s: float = Field(gt=0)


class Calibration(Section):
    """The file configs/calibration.yaml."""

    constants: FittedConstants
    interval: float = Field(gt=1)
    rows: tuple[Row, ...] = Field(min_length=1)


@lru_cache(maxsize=1)
def calibration() -> Calibration:
    """Read the bundled rows and constants."""
    path = Path(str(files("v4_ascend.configs") / "calibration.yaml"))
    return load_yaml(Calibration, path).value


def constants() -> Constants:
    """Return the fitted constants."""
    return Constants(**calibration().constants.model_dump())


def measured_rows() -> list[Row]:
    """Return the rows constants are fitted to."""
    return [r for r in calibration().rows if r.kind == "measured"]


@lru_cache(maxsize=64)
def _parts(row: Row) -> tuple[MemoryModel, System, ParallelConfig]:
    config = ModelConfig.read(preset_path(row.model))
    profile = device_profile(row.device, row.id)
    serving = Serving(row.weight_format, "native", config.max_seq_len, 4096, row.n_draft_tokens, 1)
    n_hosts = -(-row.n_devices // profile.devices_per_host)
    system = System(
        profile=profile,
        role="decode",
        hosts=tuple(map(str, range(n_hosts))),
        devices_per_host=profile.devices_per_host,
        supernode_sizes=(row.n_devices,),
        supernode_names=("",),
        levels=tuple(profile.fabric.items()),
        inter=profile.inter,
    )
    parallel = ParallelConfig(dp_size=row.n_devices, ep_size=row.ep_size)
    return MemoryModel(config, profile, serving), system, parallel


def predict_ms(row: Row, k: Constants) -> float:
    """Predict a row's time per output token."""
    memory, system, parallel = _parts(row)
    model = TimeModel(memory, system, parallel, k)
    step = model.stage(
        (0, memory.config.n_layers), _load(row), n_draft_tokens=row.n_draft_tokens
    ).total
    return 1e3 * step / (1 + row.accepted)


def _load(row: Row) -> Load:
    per_rank = -(-row.batch // row.n_devices)
    tokens = per_rank * (1 + row.n_draft_tokens)
    return Load(tokens, per_rank, row.context, tokens * row.ep_size, row.imbalance)


def bytes_only_ms(row: Row, k: Constants) -> float:
    """Predict by bytes alone: the baseline a model must beat."""
    free = Constants(k.memory_efficiency, 1e6, 1e6, 1e-12)
    return predict_ms(row, free)


START = Constants(0.7, 0.5, 0.5, 4e-6)
Predictor = Callable[[Row, Constants], float]


def fit(rows: Sequence[Row], predict: Predictor = predict_ms) -> Constants:
    """Minimise the mean squared log error by a pattern search over the constants."""
    best = START
    loss = _loss(rows, best, predict)
    scale = 2.0
    while scale > 1.01:
        improved = False
        for i in range(4):
            for factor in (scale, 1 / scale):
                values = list(astuple(best))
                values[i] *= factor
                values = [*(min(v, 1.0) for v in values[:3]), values[3]]
                tried = Constants(*values)
                if (other := _loss(rows, tried, predict)) < loss - 1e-12:
                    best, loss, improved = tried, other, True
        if not improved:
            scale = math.sqrt(scale)
    return best


def _loss(rows: Sequence[Row], k: Constants, predict: Predictor) -> float:
    return sum(math.log(predict(r, k) / r.tpot_ms) ** 2 for r in rows) / len(rows)


@dataclass(frozen=True, slots=True)
class Judged:
    """One row, predicted by constants fitted to the others."""

    row: Row
    predicted_ms: float
    baseline_ms: float

    @property
    def error(self) -> float:
        """Relative error."""
        return self.predicted_ms / self.row.tpot_ms - 1

    @property
    def baseline_error(self) -> float:
        """Relative error of bytes alone."""
        return self.baseline_ms / self.row.tpot_ms - 1


def leave_one_out(rows: Sequence[Row]) -> list[Judged]:
    """Predict every row by constants fitted to all others."""
    judged = []
    for row in rows:
        rest = [r for r in rows if r is not row]
        k, base = fit(rest), fit(rest, bytes_only_ms)
        judged.append(Judged(row, predict_ms(row, k), bytes_only_ms(row, base)))
    return judged


def interval(judged: Sequence[Judged]) -> float:
    """Return the factor within which 8 of 10 unseen rows were predicted."""
    factors = sorted(math.exp(abs(math.log1p(j.error))) for j in judged)
    return factors[math.ceil(0.8 * len(factors)) - 1]
