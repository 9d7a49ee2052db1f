"""Whatever the scheduler does with caches, answers are those each request gets alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import make_plan, write_tiny

from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.messages import Sampling
from v4_ascend.runtime.scheduler import Scheduler
from v4_ascend.runtime.sequence import Request

LENGTH = 1024
GREEDY = Sampling(0.0, 1.0, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def engine(checkpoint):
    """Caches of full pages are poisoned: rows of another request would be seen."""
    with use_policy(kernels="reference"):
        loaded = Engine.load(plan(checkpoint), lambda done, total: None)
        yield loaded


def plan(checkpoint, **changes):
    return make_plan(
        checkpoint,
        {},
        kernels="reference",
        max_model_len=LENGTH,
        max_batch_size=3,
        max_chunk=160,
        cache_tokens=2 * LENGTH,
        prefix_snapshots=3,
    ).model_copy(update=changes)


def drive(engine, limits, requests):
    """Serve requests to their end; return their tokens and the scheduler."""
    scheduler = Scheduler(limits, eos_id=-1)
    tokens = {r.id: [] for r in requests}
    for r in requests:
        scheduler.add(r)
    while (step := scheduler.next_step()) is not None:
        for token in scheduler.apply(engine.step(step)):
            tokens[token.request].append(token.sampled.token_id)
    return tokens, scheduler


def poison(engine):
    """Leave nothing in the caches that could be read by mistake and be right by chance."""
    for cache in engine.cache.layers:
        for storage in (
            cache.window,
            cache.compressed,
            cache.state,
            cache.index,
            cache.index_state,
        ):
            if storage is not None:
                storage.fill_(float("nan") if storage.is_floating_point() else 0)


def prompt(family, n_shared, own, n_own, vocab):
    g = torch.Generator().manual_seed(family)
    shared = torch.randint(0, vocab, (n_shared,), generator=g).tolist()
    g.manual_seed(1000 + own)
    return shared + torch.randint(0, vocab, (n_own,), generator=g).tolist()


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from([0, 100, 256, 300]),
            st.integers(1, 60),
            st.integers(1, 8),
        ),
        min_size=3,
        max_size=4,
    )
)
def test_answers_are_those_each_request_gets_alone(checkpoint, engine, shapes):
    """Batches, chunks, shared prefixes, and pages too few for all."""
    config, limits = engine.config, limits_of(plan(checkpoint), engine.config)
    requests = [
        Request(
            id=n,
            prompt_ids=prompt(family, n_shared, n, n_own, config.vocab_size),
            max_tokens=max_tokens,
            sampling=GREEDY,
        )
        for n, (family, n_shared, n_own, max_tokens) in enumerate(shapes)
    ]
    no_sharing = limits_of(plan(checkpoint, prefix_snapshots=0), config)
    alone = {}
    for r in requests:
        poison(engine)
        alone |= drive(engine, no_sharing, [r])[0]
    poison(engine)
    together, _ = drive(engine, limits, requests)
    assert together == alone


def test_a_prefix_is_found_and_pages_are_given_up(checkpoint, engine):
    """What the property above relies on does happen: hits, and requests sent back."""
    config = engine.config
    limits = limits_of(plan(checkpoint, cache_tokens=LENGTH), config)
    requests = [
        Request(
            id=n,
            prompt_ids=prompt(5, 256, n, 120, config.vocab_size),
            max_tokens=12,
            sampling=GREEDY,
        )
        for n in range(4)
    ]
    poison(engine)
    together, scheduler = drive(engine, limits, requests)
    assert scheduler.counters.cached_tokens >= 2 * 256
    assert scheduler.counters.preempted >= 1
    poison(engine)
    no_sharing = limits_of(plan(checkpoint, prefix_snapshots=0), config)
    assert together[3] == drive(engine, no_sharing, [requests[3]])[0][3]
