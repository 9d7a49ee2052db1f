"""Drafts over the stages of a pipeline: the answers of one process, with steps in flight."""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from layouts import write_tiny
from served import DRAFTERS, GREEDY, LENGTH, Noting, drive, plan, poison, prompt
from test_serving import SCHEDULES, check_answers

from v4_ascend.ops import Solo, use_policy
from v4_ascend.runtime.comm import Groups
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.flight import Flight
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.sequence import Request

N_STAGES = 6


@dataclass(frozen=True)
class Piped(Groups):
    """A stage of one process: what is sent lies in a queue until it is received."""

    pipe: deque = field(default_factory=deque)

    def send(self, x):
        self.pipe.append(x.clone())

    def receive(self, shape, dtype, device):
        x = self.pipe.popleft()
        assert (tuple(x.shape), x.dtype) == (shape, dtype)
        return x


@pytest.fixture(scope="module", params=DRAFTERS)
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, preset):
    return write_tiny(tmp_path_factory.mktemp(preset) / "checkpoint", preset=preset)


@pytest.fixture(scope="module")
def stages(checkpoint, preset):
    """DSpark's target layers are on three stages: what is seen behind two of them travels."""
    staged, pipe = plan(checkpoint, DRAFTERS[preset], {"pp_size": N_STAGES}), deque()

    def stage(rank):
        previous = rank - 1 if rank else None
        following = rank + 1 if rank < N_STAGES - 1 else None
        groups = Piped(rank, 0, Solo(), Solo(), Solo(), Flight(), previous, following, pipe)
        return Engine.load(staged, lambda done, total: None, groups)

    return [stage(rank) for rank in range(N_STAGES)]


@pytest.fixture(scope="module")
def engine(checkpoint, preset):
    with use_policy(kernels="reference"):
        yield Engine.load(plan(checkpoint, DRAFTERS[preset]), lambda done, total: None)


@settings(
    max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shapes=SCHEDULES)
def test_answers_are_those_each_request_gets_alone_of_one_process(
    checkpoint, engine, stages, preset, shapes
):
    check_answers(checkpoint, engine, stages, DRAFTERS[preset], shapes)


def test_guesses_are_those_of_one_process(checkpoint, engine, stages, preset):
    """Prefixes are found, requests sent back, and drafts go on after both."""
    limits = limits_of(plan(checkpoint, DRAFTERS[preset], cache_tokens=LENGTH), engine.config)
    requests = [
        Request(
            id=n,
            prompt_ids=prompt(5, 300, n, 76, engine.config.vocab_size),  # 256 are found
            max_tokens=12,
            sampling=GREEDY,
        )
        for n in range(4)
    ]

    def guesses(served):
        for stage in served:
            poison(stage)
        noting = Noting()
        tokens, scheduler = drive(served, limits, requests, noting)
        return tokens, noting.seen, scheduler.counters

    tokens, seen, counters = guesses(stages)
    assert len(seen) >= 4 * 7
    assert counters.cached_tokens >= 256
    assert counters.preempted >= 1
    assert (tokens, seen) == guesses([engine])[:2]
