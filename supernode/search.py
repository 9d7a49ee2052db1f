"""Every legal layout of a model on a system, judged; the best by an objective."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import gcd
from typing import Literal

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import ParallelConfig, Workload
from v4_ascend.supernode.calibration import constants
from v4_ascend.supernode.cost import Load
from v4_ascend.supernode.experts import ExpertLoad
from v4_ascend.supernode.memory import MemoryModel, Serving, StageMemory
from v4_ascend.supernode.rules import Broken, Candidate, Rule, applicable, first_broken
from v4_ascend.supernode.stages import balance
from v4_ascend.supernode.system import System
from v4_ascend.supernode.timing import Bound, StepTime, TimeModel

Layers = tuple[tuple[int, int], ...]  # half-open, of each stage
Objective = Literal["throughput", "latency", "context", "devices"]
ASSUMED_IMBALANCE = 1.2  # of routed tokens over ranks, without a load trace
# Draft tokens kept in a step: cann-recipes states 0.7 of 1 and 1.44 of 3 for V4's MTP.
ACCEPTED = {0: 0.0, 1: 0.7, 2: 1.12, 3: 1.44}
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class Demand:
    """What the layout is for. Times in milliseconds."""

    concurrency: int
    objective: Objective
    workload: Workload
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    expert_load: ExpertLoad | None = None


@dataclass(frozen=True, slots=True)
class Predicted:
    """Modelled times of a layout at a batch. Milliseconds, and tokens per second in all.

    `step` is one decode step, or one chunk where the devices only prefill.
    """

    tpot_ms: float
    ttft_ms: float
    tokens_per_s: float
    step: StepTime

    @property
    def time_ms(self) -> float:
        """Time per output token, or to the first one where the devices only prefill."""
        return self.tpot_ms or self.ttft_ms


@dataclass(frozen=True)
class Choice:
    """A legal layout at the batch that serves the objective best."""

    parallel: ParallelConfig
    layers: Layers
    memory: tuple[StageMemory, ...]
    batch: int
    predicted: Predicted
    meets_slo: bool
    n_idle: int

    @property
    def max_context(self) -> int:
        """Tokens of the longest request beside the other running ones."""
        return min(m.n_blocks for m in self.memory) * 128

    def n_full(self, n_tokens: int) -> int:
        """Requests of full length the whole layout holds at once."""
        return self.parallel.dp_size * min(m.n_requests(n_tokens) for m in self.memory)


@dataclass
class Rejected:
    """Layouts a rule refuses: how many, and the nearest misses with their numbers."""

    rule: Rule
    count: int = 0
    nearest: list[tuple[float, int, ParallelConfig, str]] = field(default_factory=list)

    def add(self, parallel: ParallelConfig, numbers: str, distance: float = 0.0) -> None:
        """Count one more; the nearest few are kept, in the order they came where equal."""
        self.count += 1
        bisect.insort(self.nearest, (distance, self.count, parallel, numbers), key=lambda n: n[:2])
        del self.nearest[6:]

    @property
    def examples(self) -> list[tuple[ParallelConfig, str]]:
        """Layouts with the numbers that refused them, nearest first."""
        return [(parallel, numbers) for _, _, parallel, numbers in self.nearest]


@dataclass(frozen=True)
class Found:
    """What a search found: legal layouts, best first, and the rest with reasons."""

    choices: tuple[Choice, ...]
    rejected: tuple[Rejected, ...]
    n_judged: int


MEMORY_RULE = Rule(
    id="M1",
    code="E-MEMORY",
    kind="reject",
    text="weights, overheads, the state of all running requests and one full-length request "
    "must fit",
    source="memory model (docs/planning.md)",
    date="2026-11-24",
)


class Search:
    """Judges layouts of one model on one system for one demand."""

    def __init__(
        self, config: ModelConfig, system: System, serving: Serving, demand: Demand
    ) -> None:
        self.config, self.system, self.serving, self.demand = config, system, serving, demand
        self.memory = MemoryModel(config, system.profile, serving)
        self.rules = applicable(system, serving)
        self._rejected: dict[str, Rejected] = {}
        self._n_judged = 0
        self._timed: TimeModel | None = None  # of the layout judged last
        self._prefilled: tuple[TimeModel, Layers, tuple[StepTime, float]] | None = None
        self._imbalance: dict[tuple[int, int], float] = {}

    def run(self, layout: ParallelConfig | None = None) -> Found:
        """Judge all layouts, or one; legal ones come best first."""
        choices = []
        for parallel in self._layouts() if layout is None else [layout]:
            self._n_judged += 1
            if (choice := self.judge(parallel, is_asked=layout is not None)) is not None:
                choices.append(choice)
        choices.sort(key=self._rank)
        rejected = sorted(self._rejected.values(), key=lambda r: -r.count)
        return Found(tuple(choices), tuple(rejected), self._n_judged)

    def judge(self, parallel: ParallelConfig, *, is_asked: bool = False) -> Choice | None:
        """Return the layout at its best batch, or record why it is not legal."""
        candidate = Candidate(self.config, self.system, self.serving, parallel)
        broken = first_broken(candidate, self.rules, is_asked=is_asked)
        if broken is not None:
            self._refuse(parallel, broken)
            return None
        least = -(-self.demand.concurrency // parallel.dp_size)
        layers = self._layers(parallel, least)
        memory = self._stages(parallel, layers, least)
        if not all(m.fits(self.serving.max_model_len) for m in memory):
            short = -min(m.free for m in memory)
            self._refuse(parallel, Broken(MEMORY_RULE, self._shortage(layers, memory)), short)
            return None
        return self._at_best_batch(parallel, layers, least)

    def predict(
        self,
        parallel: ParallelConfig,
        layers: Layers,
        batch: int,
        bound: Bound = "value",
    ) -> Predicted:
        """Estimate times at `batch` running requests of each DP group."""
        model, work = self.time_model(parallel, bound), self.demand.workload
        if self.system.role == "prefill":
            chunk, ttft_s = self._prefill(model, layers)
            rate = parallel.dp_size * work.input_tokens / ttft_s
            return Predicted(0.0, 1e3 * ttft_s, rate, chunk)
        step, out = self._decode(model, layers, batch), work.output_tokens
        tpot_s = step.total / (1 + self._accepted)
        ttft_s = self._prefill(model, layers)[1] if self.system.role == "both" else 0.0
        # Prefills of the running requests take their share of the same devices.
        cycle = out * tpot_s + batch * ttft_s
        rate = parallel.dp_size * batch * out / cycle
        return Predicted(1e3 * tpot_s, 1e3 * (ttft_s + step.total), rate, step)

    def _layouts(self) -> Iterator[ParallelConfig]:
        n, c = self.system.n_devices, self.config
        sizes = [s for s in (1, 2, 4, 8, 16, 32) if s <= n]
        seen = set()
        for pp in [p for p in sizes if p <= c.n_layers]:
            for tp in [t for t in sizes if t <= 16]:
                for cp in sizes if self.system.role == "prefill" else sizes[:2]:
                    room = n // (pp * tp * cp)
                    for ep in self._ep_sizes(room * tp * cp):
                        unit = ep // gcd(ep, tp * cp)
                        for dp in {room - room % unit, unit}:
                            for dsa_cp, more in product(
                                (False, True) if tp > 1 else (False,), self._redundancies(ep)
                            ):
                                key = (pp, dp, cp, tp, ep, dsa_cp, more)
                                if dp >= 1 and dp <= room and key not in seen:
                                    seen.add(key)
                                    yield ParallelConfig(
                                        pp_size=pp, dp_size=dp, cp_size=cp, tp_size=tp,
                                        ep_size=ep, dsa_cp=dsa_cp, n_redundant_experts=more,
                                    )  # fmt: skip

    def _ep_sizes(self, most: int) -> list[int]:
        n = self.config.n_routed_experts
        return [e for e in range(1, min(n, most) + 1) if n % e == 0]

    def _redundancies(self, ep_size: int) -> tuple[int, ...]:
        """Without a trace nothing says which experts to copy; with one, none to two a rank."""
        if self.demand.expert_load is None or ep_size == 1:
            return (0,)
        return (0, ep_size, 2 * ep_size)

    def imbalance(self, parallel: ParallelConfig) -> float:
        """Return the busiest rank's routed tokens over the mean: assumed, or from the trace."""
        key = (parallel.ep_size, parallel.n_redundant_experts)
        if parallel.ep_size == 1:
            return 1.0
        if self.demand.expert_load is None:
            return ASSUMED_IMBALANCE
        if key not in self._imbalance:
            self._imbalance[key] = self.demand.expert_load.imbalance(*key)
        return self._imbalance[key]

    def _refuse(self, parallel: ParallelConfig, broken: Broken, distance: float = 0.0) -> None:
        entry = self._rejected.setdefault(broken.rule.id, Rejected(broken.rule))
        entry.add(parallel, broken.numbers, distance)

    def _layers(self, parallel: ParallelConfig, batch: int) -> Layers:
        c, pp = self.config, parallel.pp_size
        if pp == 1:
            return ((0, c.n_layers),)
        model, load = self.time_model(parallel), self.decode_load(parallel, max(1, batch // pp))
        costs = [model.layer_s(i, load) for i in range(c.n_layers)]
        last = model.head_s(load)
        if self.serving.n_draft_tokens:
            last += model.drafter_s(load, self.serving.n_draft_tokens)
        return balance(costs, pp, 0.0, last)

    def _stages(
        self, parallel: ParallelConfig, layers: Layers, batch: int
    ) -> tuple[StageMemory, ...]:
        return tuple(self.memory.stage(parallel, r, batch) for r in layers)

    def _shortage(self, layers: Layers, memory: tuple[StageMemory, ...]) -> str:
        i, worst = min(enumerate(memory), key=lambda p: p[1].free)
        request = -(-self.serving.max_model_len // 128) * worst.per_block
        stage = f"stage {i} (layers {layers[i][0]} to {layers[i][1] - 1}): " if i else ""
        return (
            f"{stage}{worst.fixed / 1e9:.1f} GB + one request of {request / 1e9:.2f} GB, "
            f"{worst.available / 1e9:.1f} GB may be used; the largest term is "
            f"{worst.binding_term}, {worst.terms[worst.binding_term] / 1e9:.1f} GB"
        )

    def _at_best_batch(self, parallel: ParallelConfig, layers: Layers, least: int) -> Choice:
        best: Choice | None = None
        for batch in (least, *(b for b in BATCHES if b > least)):
            grows = self.demand.objective == "throughput" and self.system.role != "prefill"
            if batch > least and not grows:
                break
            memory = self._stages(parallel, layers, batch)
            if batch > least and not self._holds(memory, batch):
                break
            predicted = self.predict(parallel, layers, batch)
            choice = Choice(
                parallel=parallel,
                layers=layers,
                memory=memory,
                batch=batch,
                predicted=predicted,
                meets_slo=self._meets(predicted),
                n_idle=self.system.n_devices - parallel.world_size,
            )
            if best is None or self._rank(choice) < self._rank(best):
                best = choice
            elif not choice.meets_slo:
                break  # more requests only take longer
        if best is None:
            raise AssertionError("the least batch was judged legal")
        return best

    def _holds(self, memory: tuple[StageMemory, ...], batch: int) -> bool:
        """Beyond the asked concurrency, requests must fit at their typical length."""
        work = self.demand.workload
        typical = work.input_tokens + work.output_tokens
        return all(
            m.fits(self.serving.max_model_len) and m.n_requests(typical) >= batch for m in memory
        )

    def _meets(self, p: Predicted) -> bool:
        d = self.demand
        return (d.tpot_ms is None or self.system.role == "prefill" or p.tpot_ms <= d.tpot_ms) and (
            d.ttft_ms is None or self.system.role == "decode" or p.ttft_ms <= d.ttft_ms
        )

    def _rank(self, c: Choice) -> tuple[float, ...]:
        p, missed = c.predicted, float(not c.meets_slo)
        match self.demand.objective:
            case "throughput":
                return (missed, -p.tokens_per_s, c.parallel.world_size)
            case "latency":
                return (missed, p.time_ms, c.parallel.world_size)
            case "context":
                # Beyond what the model is made for, more is no better.
                return (missed, -min(c.max_context, self.config.max_seq_len), p.time_ms)
            case "devices":
                return (missed, c.parallel.world_size, -p.tokens_per_s)

    @cached_property
    def _accepted(self) -> float:
        n = self.serving.n_draft_tokens
        return ACCEPTED.get(n, ACCEPTED[3])

    def time_model(self, parallel: ParallelConfig, bound: Bound = "value") -> TimeModel:
        """Return the times of one layout; the last one is kept."""
        if self._timed is None or (self._timed.p, self._timed.bound) != (parallel, bound):
            self._timed = TimeModel(self.memory, self.system, parallel, constants(), bound)
        return self._timed

    def decode_load(self, parallel: ParallelConfig, batch: int) -> Load:
        """Say what a rank does in a decode step of `batch` requests, at their mean length."""
        work = self.demand.workload
        tokens = batch * (1 + self.serving.n_draft_tokens)
        n_groups = max(1, parallel.ep_size // (parallel.tp_size * parallel.cp_size))
        return Load(
            n_tokens=tokens,
            n_requests=batch,
            context=work.input_tokens + work.output_tokens // 2,
            n_group_tokens=tokens * n_groups,
            imbalance=self.imbalance(parallel),
        )

    def _decode(self, model: TimeModel, layers: Layers, batch: int) -> StepTime:
        """Time a step; with stages, micro-batches follow each other and the slowest one rules."""
        pp = len(layers)
        load = self.decode_load(model.p, -(-batch // pp))
        drafts = self.serving.n_draft_tokens
        stages = [model.stage(r, load, n_draft_tokens=drafts) for r in layers]
        if pp == 1:
            return stages[0]
        slowest = max(stages, key=lambda s: s.total)
        boundary = pp * model.boundary_s(load.n_tokens, layers)
        parts = {name: pp * s for name, s in slowest.parts.items()}
        return StepTime(parts | {"stage boundaries": boundary})

    def prefill_load(self, parallel: ParallelConfig) -> tuple[Load, int]:
        """Say what a rank does with one chunk of a typical prompt, and how many there are."""
        work, p = self.demand.workload, parallel
        chunk = min(self.serving.max_chunk, work.input_tokens)
        tokens = -(-chunk // p.cp_size)
        load = Load(
            n_tokens=tokens,
            n_requests=1,
            context=work.input_tokens // 2,
            n_group_tokens=tokens * max(1, p.ep_size // p.tp_size),
            imbalance=self.imbalance(p),
            is_prefill=True,
        )
        return load, -(-work.input_tokens // chunk)

    def _prefill(self, model: TimeModel, layers: Layers) -> tuple[StepTime, float]:
        """Time one chunk of the slowest stage, and all chunks of a typical prompt through all."""
        if self._prefilled is not None and self._prefilled[:2] == (model, layers):
            return self._prefilled[2]
        load, n_chunks = self.prefill_load(model.p)
        slowest = max((model.stage(r, load) for r in layers), key=lambda s: s.total)
        boundary = model.boundary_s(load.n_tokens, layers)
        took = slowest, (n_chunks + len(layers) - 1) * (slowest.total + boundary)
        self._prefilled = (model, layers, took)  # the same at every batch
        return took
