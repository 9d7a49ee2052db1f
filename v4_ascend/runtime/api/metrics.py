"""What ``/metrics`` says: vLLM's names where vLLM has one, ``v4_ascend_*`` for the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from v4_ascend.runtime.dispatcher import Dispatcher
from v4_ascend.runtime.messages import OperatorTimes
from v4_ascend.supernode.plan import Plan

# Buckets as vLLM's, so that its dashboards read the same; seconds and tokens.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5,
                10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
_BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5,
                   10, 20, 40, 80)  # fmt: skip
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
          7680)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
           200_000, 500_000, 1_000_000)  # fmt: skip
LABELS = ("model_name",)


class Metrics:
    """Counts and times requests; gauges are read when somebody asks."""

    def __init__(self, plan: Plan, dispatcher: Dispatcher) -> None:
        self._model = plan.model_name
        self._registry = registry = CollectorRegistry()
        registry.register(_State(plan, dispatcher))

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, what, LABELS, buckets=buckets, registry=registry)
            made.labels(self._model)  # there from the start, at 0
            return made

        self.first = histogram(
            "vllm:time_to_first_token_seconds", "from request to first token", _FIRST_TOKEN
        )
        self.between = histogram(
            "vllm:inter_token_latency_seconds", "from a token to the next", _BETWEEN_TOKENS
        )
        self.per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "a request's mean from its first token on",
            _BETWEEN_TOKENS,
        )
        self.whole = histogram("vllm:e2e_request_latency_seconds", "of a request", _WHOLE)
        self.prompt_lengths = histogram("vllm:request_prompt_tokens", "of a request", _TOKENS)
        self.lengths = histogram("vllm:request_generation_tokens", "of a request", _TOKENS)
        self.steps = histogram("v4_ascend_step_seconds", "of a step on the ranks", _BETWEEN_TOKENS)
        where = (*LABELS, "stage", "kind")
        self.operators = Counter(
            "v4_ascend_operator_seconds",
            "of each operator in the timed steps, some of all, on a stage's first rank",
            (*where, "operator"),
            registry=registry,
        )
        self.timed = Counter("v4_ascend_timed_steps", "decode or prefill", where, registry=registry)
        self.prompts = Counter("vllm:prompt_tokens", "prefilled", LABELS, registry=registry)
        self.tokens = Counter("vllm:generation_tokens", "drawn", LABELS, registry=registry)
        for counter in (self.prompts, self.tokens):
            counter.labels(self._model)
        self.ended = Counter(
            "vllm:request_success",
            "answers by how they ended",
            (*LABELS, "finished_reason"),
            registry=registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self.ended.labels(self._model, reason)
        dispatcher.observe_step = self.steps.labels(self._model).observe
        dispatcher.observe_operators = self._timed_step

    def _timed_step(self, stage: int, times: OperatorTimes) -> None:
        where = self._model, str(stage), times.kind
        self.timed.labels(*where).inc()
        for operator, seconds in times.seconds.items():
            self.operators.labels(*where, operator).inc(max(0.0, seconds))

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def begin(self, n_prompt: int) -> Timing:
        """Begin to time an answer."""
        return Timing(self, self._model, n_prompt)


class Timing:
    """Times one answer."""

    def __init__(self, metrics: Metrics, model: str, n_prompt: int) -> None:
        self._metrics, self._model, self._n_prompt = metrics, model, n_prompt
        self._start = self._last = time.monotonic()
        self._first, self._n_tokens = 0.0, 0

    def token(self) -> None:
        """Note a token."""
        m, now = self._metrics, time.monotonic()
        if not self._n_tokens:
            self._first = now
            m.first.labels(self._model).observe(now - self._start)
            m.prompts.labels(self._model).inc(self._n_prompt)
            m.prompt_lengths.labels(self._model).observe(self._n_prompt)
        else:
            m.between.labels(self._model).observe(now - self._last)
        m.tokens.labels(self._model).inc()
        self._last = now
        self._n_tokens += 1

    def end(self, reason: str) -> None:
        """Note the end: stop, length, abort (the client has left) or error."""
        m = self._metrics
        m.ended.labels(self._model, reason).inc()
        if reason in ("stop", "length"):
            m.whole.labels(self._model).observe(self._last - self._start)
            m.lengths.labels(self._model).observe(self._n_tokens)
            if self._n_tokens > 1:
                mean = (self._last - self._first) / (self._n_tokens - 1)
                m.per_token.labels(self._model).observe(mean)


class _State(Collector):
    """What the dispatcher knows now."""

    def __init__(self, plan: Plan, dispatcher: Dispatcher) -> None:
        self._plan, self._dispatcher = plan, dispatcher

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yield gauges, and the scheduler's counters."""
        d, model = self._dispatcher, [self._plan.model_name]
        ranks = d.watch.ranks.values()
        for name, what, value in (
            ("vllm:num_requests_running", "requests with a slot", d.scheduler.n_running),
            ("vllm:num_requests_waiting", "requests without one", d.scheduler.n_waiting),
            ("vllm:kv_cache_usage_perc", "part of the pages in use", d.scheduler.cache_usage),
            ("v4_ascend_cached_pages", "that hold a known prefix", d.scheduler.n_cached),
            ("v4_ascend_drafting", "1 while the drafter runs", int(d.scheduler.drafts)),
            ("v4_ascend_ready", "1 once the canary has passed", int(d.health.is_ready)),
            ("v4_ascend_ranks", "of the plan", self._plan.parallel.world_size),
            ("v4_ascend_ranks_ready", "loaded and checked", sum(r.is_ready for r in ranks)),
            ("v4_ascend_loaded_bytes", "read of the checkpoint", sum(r.loaded for r in ranks)),
            ("v4_ascend_resident_bytes", "of weights on ranks", sum(r.resident for r in ranks)),
            ("v4_ascend_graphs", "captured decode steps", sum(r.n_graphs for r in ranks)),
        ):
            gauge = GaugeMetricFamily(name, what, labels=LABELS)
            gauge.add_metric(model, value)
            yield gauge
        counted = d.scheduler.counters
        n_compiled = sum(r.beat.n_compiled for r in ranks if r.beat is not None)
        for name, what, value in (
            ("vllm:prefix_cache_queries", "prompt tokens looked for", counted.prompt_tokens),
            ("vllm:prefix_cache_hits", "prompt tokens found", counted.cached_tokens),
            ("vllm:num_preemptions", "requests sent back for want of pages", counted.preempted),
            ("v4_ascend_compilations", "kernels compiled while serving", n_compiled),
            ("vllm:spec_decode_num_drafts", "times some were guessed", counted.drafts),
            ("vllm:spec_decode_num_draft_tokens", "guessed", counted.drafted),
            ("vllm:spec_decode_num_accepted_tokens", "guessed right", counted.accepted),
        ):
            counter = CounterMetricFamily(name, what, labels=LABELS)
            counter.add_metric(model, value)
            yield counter
        by_place = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "guessed right, by place behind the last token",
            labels=(*LABELS, "position"),
        )
        for place, n in enumerate(counted.accepted_at):
            by_place.add_metric([*model, str(place)], n)
        yield by_place
        yield from self._exchanges()
        load = GaugeMetricFamily(
            "v4_ascend_expert_load_imbalance",
            "rows of the busiest expert of a layer by the mean, since loading",
            labels=(*LABELS, "layer"),
        )
        for layer, counts in enumerate(d.expert_load()):
            if total := sum(counts):
                load.add_metric([*model, str(layer)], max(counts) * len(counts) / total)
        yield load

    def _exchanges(self) -> Iterator[CounterMetricFamily]:
        """Yield what ranks say of their exchanges, by stage and group."""
        labels = (*LABELS, "stage", "group")
        sent = CounterMetricFamily(
            "v4_ascend_sent_bytes", "that left a stage's ranks for others", labels=labels
        )
        waited = CounterMetricFamily(
            "v4_ascend_waited_seconds",
            "of a stage's ranks in exchanges; in group pp for other stages, in front for steps",
            labels=labels,
        )
        beats = {r: s.beat for r, s in self._dispatcher.watch.ranks.items() if s.beat is not None}
        for family, of_ranks in (
            (sent, {r: beat.bytes_sent for r, beat in beats.items()}),
            (waited, {r: beat.waited_s for r, beat in beats.items()}),
        ):
            totals: dict[tuple[int, str], float] = {}
            for rank, by_group in of_ranks.items():
                stage = rank // self._plan.parallel.stage_size
                for group, n in by_group.items():
                    totals[stage, group] = totals.get((stage, group), 0) + n
            for (stage, group), total in sorted(totals.items()):
                family.add_metric([self._plan.model_name, str(stage), group], total)
            yield family
