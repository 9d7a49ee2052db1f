"""A discrete-event simulation of decode steps or one prefill over every device of a plan.

Each device has a clock. A layer's compute is its own; dispatch and combine wait for the whole EP
group; at a stage's end the streams go to the device of the same place in the next stage. Where
all stages are equal and nothing is slow, the closed form of the time model is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from v4_ascend.errors import ConfigError
from v4_ascend.supernode.timing import LayerWork, Transfer

Clock = NDArray[np.float64]


@dataclass(frozen=True)
class Pipeline:
    """What is simulated. `stages` has the layers of each; `tail_s` is the head on the last.

    `is_decode`: a micro-batch enters the first stage again when it has left the last one.
    """

    stages: tuple[tuple[LayerWork, ...], ...]
    stage_size: int
    ep_size: int
    n_micro_batches: int
    boundary_s: float = 0.0
    tail_s: float = 0.0
    is_decode: bool = True

    def __post_init__(self) -> None:
        """Refuse what is no pipeline."""
        if not self.stages or not all(self.stages):
            raise ConfigError("simulation", "a pipeline has stages, a stage has layers")
        if self.ep_size < 1 or self.stage_size % self.ep_size:
            raise ConfigError(
                "simulation", f"ep_size {self.ep_size} must divide {self.stage_size} devices"
            )
        if self.n_micro_batches < 1:
            raise ConfigError("simulation", f"{self.n_micro_batches} micro-batches")
        if min(w.compute_s for s in self.stages for w in s) < 0:
            raise ConfigError("simulation", "a layer takes negative time")

    @property
    def n_devices(self) -> int:
        """Devices of all stages."""
        return len(self.stages) * self.stage_size


@dataclass(frozen=True)
class Faults:
    """What goes wrong: slower devices by number, one that fails, levels shared with others."""

    slow: Mapping[int, float] = field(default_factory=dict)
    failed: int | None = None
    contention: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stall:
    """Where a failed device stops the step: its EP group, and all devices that wait."""

    stage: int
    group: int
    devices: tuple[int, int]
    n_waiting: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a simulation saw. `step_s` is the period of a decode step, or a whole prefill."""

    step_s: float
    busy: tuple[float, ...]
    waiting: float
    stalled: Stall | None


def simulate(pipeline: Pipeline, faults: Faults | None = None, n_steps: int = 3) -> Timeline:
    """Run steps until the pipeline is full; a decode step's time is that of the last one.

    Raises:
        ConfigError: a fault names a device that is not there, or speeds one up.
    """
    faults = faults or Faults()
    p = pipeline
    slowdown = _slowdown(p, faults)
    n_stages, n_steps = len(p.stages), n_steps if p.is_decode else 1
    free = np.zeros((n_stages, p.stage_size))
    entered = np.zeros((p.n_micro_batches, p.stage_size))
    busy = np.zeros(n_stages)
    waited, ends = 0.0, []
    with np.errstate(invalid="ignore"):
        for _ in range(n_steps):
            busy[:], waited = 0.0, 0.0
            for m in range(p.n_micro_batches):
                at = entered[m]
                for stage, layers in enumerate(p.stages):
                    start = np.maximum(at, free[stage])
                    at, wait = _stage(p, layers, start, slowdown[stage], faults.contention)
                    if stage == n_stages - 1:
                        at = at + p.tail_s * slowdown[stage]
                    busy[stage] += float(np.mean(at - start))
                    waited += wait / n_stages
                    free[stage] = at
                    at = at + (p.boundary_s if n_stages > 1 else 0.0)
                entered[m] = at
            ends.append(float(entered.max()))
    stalled = _stall(p, faults, free)
    period = ends[-1] - (ends[-2] if len(ends) > 1 else 0.0)
    if stalled is not None:
        return Timeline(float("inf"), (0.0,) * n_stages, 0.0, stalled)
    return Timeline(period, tuple(busy / period), waited / period, None)


def closed_form(pipeline: Pipeline) -> float:
    """Return the time of a full decode step, or of a prefill, from the slowest stage.

    Exact where all stages but for the head are equal, nothing is slow or shared, and there are
    at least as many micro-batches as stages (decode: exactly as many).
    """
    p, n = pipeline, len(pipeline.stages)
    times = [sum(_alone(w) for w in layers) for layers in p.stages]
    times[-1] += p.tail_s
    boundary = p.boundary_s if n > 1 else 0.0
    if p.is_decode:
        return max(sum(times) + n * boundary, p.n_micro_batches * max(times))
    return sum(times) + n * boundary + (p.n_micro_batches - 1) * max(times)


def _alone(work: LayerWork) -> float:
    return work.compute_s + _exchange_s(work.dispatch, {}) + _exchange_s(work.combine, {})


def _exchange_s(transfers: tuple[Transfer, ...], contention: Mapping[str, float]) -> float:
    return max(
        (t.latency_s + t.transfer_s * contention.get(t.level, 1.0) for t in transfers),
        default=0.0,
    )


def _stage(
    p: Pipeline,
    layers: tuple[LayerWork, ...],
    start: Clock,
    slowdown: Clock,
    contention: Mapping[str, float],
) -> tuple[Clock, float]:
    """Advance a stage's clocks by its layers; also return the mean wait at barriers."""
    at, wait = start.reshape(-1, p.ep_size), 0.0
    slow = slowdown.reshape(at.shape)
    for work in layers:
        at = at + work.compute_s * slow
        if work.dispatch:
            together = at.max(axis=1, keepdims=True)
            wait += float(np.mean(together - at))
            exchange = _exchange_s(work.dispatch, contention)
            exchange += _exchange_s(work.combine, contention)
            at = np.broadcast_to(together + exchange, at.shape)
    return at.reshape(start.shape), wait


def _slowdown(p: Pipeline, faults: Faults) -> Clock:
    factors = np.ones(p.n_devices)
    for device, factor in faults.slow.items():
        _require_device(p, device)
        if factor < 1:
            raise ConfigError("simulation", f"device {device}: factor {factor} must be at least 1")
        factors[device] = factor
    if faults.failed is not None:
        _require_device(p, faults.failed)
        factors[faults.failed] = np.inf
    for level, factor in faults.contention.items():
        if factor < 1:
            raise ConfigError("simulation", f"level {level}: factor {factor} must be at least 1")
    return factors.reshape(len(p.stages), p.stage_size)


def _require_device(p: Pipeline, device: int) -> None:
    if not 0 <= device < p.n_devices:
        raise ConfigError("simulation", f"device {device} of {p.n_devices}")


def _stall(p: Pipeline, faults: Faults, free: Clock) -> Stall | None:
    if faults.failed is None:
        return None
    stage, place = divmod(faults.failed, p.stage_size)
    group = place // p.ep_size
    first = stage * p.stage_size + group * p.ep_size
    waiting = int(np.sum(~np.isfinite(free)))
    return Stall(stage, group, (first, first + p.ep_size), waiting)
