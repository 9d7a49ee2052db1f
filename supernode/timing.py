"""From bytes and operations to milliseconds: a roofline, and overheads fitted to published runs.

Every figure is *modelled*. The constants are in configs/calibration.yaml with the rows they were
fitted to; `v4-ascend plan calibration` shows how far they are off on rows they have not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from v4_ascend.config.devices import DeviceProfile, Figure
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.supernode.cost import ACT, CostModel, Load, OpCost, Part
from v4_ascend.supernode.memory import MemoryModel
from v4_ascend.supernode.system import System
from v4_ascend.supernode.traffic import boundary_bytes

Bound = Literal["low", "value", "high"]
# Vector units: the FP16 rate over the BF16 cube rate of the same chips, about 1 to 8.
VECTOR_SHARE = 1 / 8
ASSUMED_EFFICIENCY = 0.5  # of families no published run was fitted for


@dataclass(frozen=True, slots=True)
class Constants:
    """What is fitted: parts of the profile's rates, and seconds a kernel takes at least.

    The cube's part has one value for 950 and one for the 910 generation (A2, A3).
    """

    memory_efficiency: float
    cube_efficiency_950: float
    cube_efficiency_910: float
    kernel_s: float

    def compute_efficiency(self, family: str) -> float:
        """Return the part of the cube's rate a family reaches."""
        return {
            "950": self.cube_efficiency_950,
            "a2": self.cube_efficiency_910,
            "a3": self.cube_efficiency_910,
        }.get(family, ASSUMED_EFFICIENCY)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step of one stage, by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Transfer:
    """One exchange on one fabric level: what does not depend on its load, and what does."""

    level: str
    latency_s: float
    transfer_s: float


@dataclass(frozen=True, slots=True)
class LayerWork:
    """Seconds one layer computes, and its dispatch and combine on each level they use."""

    compute_s: float
    dispatch: tuple[Transfer, ...] = ()
    combine: tuple[Transfer, ...] = ()


class TimeModel:
    """Times steps of one layout on one system."""

    def __init__(
        self,
        memory: MemoryModel,
        system: System,
        parallel: ParallelConfig,
        constants: Constants,
        bound: Bound = "value",
    ) -> None:
        self.memory, self.system, self.p = memory, system, parallel
        self.constants, self.bound = constants, bound
        self.cost = CostModel(memory, parallel)
        self.profile: DeviceProfile = system.profile
        self._timed: dict[tuple[tuple[int, bool], Load], dict[str, float]] = {}
        self._counts: dict[tuple[int, int], Counter[tuple[int, bool]]] = {}
        self._bandwidth = self.profile.memory_bytes_per_s.value * constants.memory_efficiency
        self._efficiency = constants.compute_efficiency(self.profile.family)

    def stage(self, layers: tuple[int, int], load: Load, *, n_draft_tokens: int = 0) -> StepTime:
        """Time one stage on `layers`; the last one has head and drafter."""
        c = self.memory.config
        parts: dict[str, float] = {}
        for kind, n in self._counted(layers).items():
            for part, s in self._kind_parts(kind, load).items():
                parts[part] = parts.get(part, 0.0) + n * s
        if layers[1] == c.n_layers:
            self._put(parts, self.cost.head(load), 1)
            if n_draft_tokens:
                parts["drafter"] = self.drafter_s(load, n_draft_tokens)
        return StepTime(parts)

    def drafter_s(self, load: Load, n_draft_tokens: int) -> float:
        """Seconds of drafting: by MTP a pass for each token, by DSpark one for a whole block."""
        c, parts = self.memory.config, dict[str, float]()
        block = c.dspark.block_size if c.dspark else 1
        n_layers, n_passes = (c.n_draft_layers, 1) if c.dspark else (1, n_draft_tokens)
        n = load.n_requests * block
        n_group = max(1, load.n_group_tokens * n // load.n_tokens)
        draft = replace(load, n_tokens=n, n_group_tokens=n_group)
        for layer in range(c.n_layers, c.n_layers + n_layers):
            self._add(parts, layer, draft, n_passes)
        self._put(parts, self.cost.head(draft), n_passes)
        if c.dspark:
            self._put(parts, self.cost.markov(load, c.dspark), block)
        return sum(parts.values())

    def layer_s(self, layer: int, load: Load) -> float:
        """Seconds of one layer, its collectives included."""
        if layer < self.memory.config.n_layers:
            return sum(self._kind_parts(self._kinds[layer], load).values())
        parts: dict[str, float] = {}
        self._add(parts, layer, load, 1)
        return sum(parts.values())

    def layer_work(self, layer: int, load: Load) -> LayerWork:
        """Split one layer into what a device does alone and its two exchanges."""
        parts: dict[str, float] = {}
        self._add(parts, layer, load, 1)
        parts.pop("dispatch and combine", None)
        once, twice = self._exchanged(load)
        return LayerWork(sum(parts.values()), self._transfers(once), self._transfers(twice))

    def head_s(self, load: Load) -> float:
        """Seconds of the output head."""
        return self._op_s(self.cost.head(load))

    def boundary_s(self, n_tokens: int, layers: Sequence[tuple[int, int]]) -> float:
        """Seconds that streams take to the last of the stages: hc_mult * dim values a token.

        For DSpark the means behind its target layers on other stages travel with them.
        """
        if self.p.pp_size == 1:
            return 0.0
        c = self.memory.config
        targets = c.dspark.target_layer_ids if c.dspark and self.memory.drafts else ()
        n_bytes = boundary_bytes(c, n_tokens, ACT, sum(n < layers[-1][0] for n in targets))
        hop = self.system.hops(2, self.p.stage_size)[-1]
        rate, latency = self._figure(hop.link.bytes_per_s), hop.link.latency_s.value
        return latency + n_bytes / rate

    @cached_property
    def _kinds(self) -> list[tuple[int, bool]]:
        """Ratio of each layer, and whether it routes by hash: layers of a kind cost alike."""
        c = self.memory.config
        return [(c.compress_ratios[i], i < c.n_hash_layers) for i in range(c.n_layers)]

    def _counted(self, layers: tuple[int, int]) -> Counter[tuple[int, bool]]:
        if layers not in self._counts:
            self._counts[layers] = Counter(self._kinds[slice(*layers)])
        return self._counts[layers]

    def _kind_parts(self, kind: tuple[int, bool], load: Load) -> dict[str, float]:
        """Time one layer of a kind, once for each load."""
        if (kind, load) not in self._timed:
            parts: dict[str, float] = {}
            self._add(parts, self._kinds.index(kind), load, 1)
            self._timed[kind, load] = parts
        return self._timed[kind, load]

    def _add(self, parts: dict[str, float], layer: int, load: Load, times: int) -> None:
        for op in self.cost.layer(layer, load):
            self._put(parts, op, times)
        if self.p.ep_size > 1:
            s = self._exchange_s(load)
            parts["dispatch and combine"] = parts.get("dispatch and combine", 0.0) + times * s
        if self.p.tp_size > 1:
            s = self._tp_s(load)
            parts["tensor parallel"] = parts.get("tensor parallel", 0.0) + times * s

    def _put(self, parts: dict[str, float], op: OpCost, times: int) -> None:
        part: Part = op.part
        parts[part] = parts.get(part, 0.0) + times * self._op_s(op)

    def _op_s(self, op: OpCost) -> float:
        move = op.n_bytes / self._bandwidth
        compute = op.flops / (self._rates[op.unit] * self._efficiency)
        return max(move, compute) + op.n_kernels * self.constants.kernel_s

    @cached_property
    def _rates(self) -> dict[str, float]:
        p = self.profile
        bf16 = self._figure(p.bf16_flops or p.fp32_flops)
        fast = p.fp8_flops or p.int8_flops
        dense = fast if fast and self.memory.serving.weight_format != "bf16" else None
        return {
            "vector": bf16 * VECTOR_SHARE,
            "bf16": bf16,
            "dense": self._figure(dense) if dense else bf16,
        }

    def _exchange_s(self, load: Load) -> float:
        dispatch, combine = self._exchanged(load)
        return self._all_to_all_s(dispatch) + self._all_to_all_s(combine)

    def _exchanged(self, load: Load) -> tuple[float, float]:
        """Bytes of dispatch and combine: a token goes once to each rank that has its experts."""
        c, ep = self.memory.config, self.p.ep_size
        reached = ep * (1 - (1 - 1 / ep) ** c.n_activated_experts)
        n = load.n_tokens / (self.p.tp_size if self.p.dsa_cp else 1) * load.imbalance
        sent = n * reached * c.dim
        return sent * (1 if self.memory.serving.weight_format != "bf16" else ACT), sent * ACT

    @cached_property
    def _ep_hops(self) -> tuple[tuple[str, float, float, float], ...]:
        """Name, share of traffic, bytes per second and latency of each level an EP group spans."""
        n = self.p.ep_size
        return tuple(
            (h.name, h.n_peers / n, self._figure(h.link.bytes_per_s), h.link.latency_s.value)
            for h in self.system.hops(n)
        )

    def _transfers(self, n_bytes: float) -> tuple[Transfer, ...]:
        if self.p.ep_size == 1:
            return ()
        return tuple(
            Transfer(name, latency + self.constants.kernel_s, n_bytes * share / rate)
            for name, share, rate, latency in self._ep_hops
        )

    def _all_to_all_s(self, n_bytes: float) -> float:
        return max((t.latency_s + t.transfer_s for t in self._transfers(n_bytes)), default=0.0)

    def _tp_s(self, load: Load) -> float:
        """Seconds of one all-gather and one reduce-scatter of the hidden state."""
        c, tp = self.memory.config, self.p.tp_size
        rate, latency = self._tp_link
        once = latency + load.n_tokens * c.dim * ACT * (tp - 1) / tp / rate
        return 2 * (once + self.constants.kernel_s)

    @cached_property
    def _tp_link(self) -> tuple[float, float]:
        """Bytes per second and latency of the outermost level a TP group spans."""
        link = self.system.hops(self.p.tp_size)[-1].link
        return self._figure(link.bytes_per_s), link.latency_s.value

    def _figure(self, figure: Figure | None) -> float:
        if figure is None:
            raise ValueError(f"{self.profile.name} has no rate for this model")
        if self.bound == "low":
            return figure.low or figure.value
        if self.bound == "high":
            return figure.high or figure.value
        return figure.value
