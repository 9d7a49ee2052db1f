"""Whatever the scheduler does with caches, answers are those each request gets alone."""

import math
from dataclasses import replace as changed

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import write_tiny
from served import (
    DRAFTERS,
    GREEDY,
    LENGTH,
    drive,
    lucky,
    plan,
    poison,
    prompt,
    requests_of,
)

from v4_ascend.model.dspark import Targets
from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.sequence import Request


@pytest.fixture(scope="module", params=DRAFTERS)
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def n_drafts(preset):
    return DRAFTERS[preset]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, preset):
    return write_tiny(tmp_path_factory.mktemp(preset) / "checkpoint", preset=preset)


@pytest.fixture(scope="module")
def engine(checkpoint, n_drafts):
    """Caches of full pages are poisoned: rows of another request would be seen."""
    with use_policy(kernels="reference"):
        loaded = Engine.load(plan(checkpoint, n_drafts), lambda done, total: None)
        yield loaded


SCHEDULES = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from([0, 100, 256, 300]),
        st.integers(1, 60),
        st.integers(1, 8),
        st.booleans(),
    ),
    min_size=3,
    max_size=4,
)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shapes=SCHEDULES)
def test_answers_are_those_each_request_gets_alone(checkpoint, engine, n_drafts, shapes):
    check_answers(checkpoint, engine, [engine], n_drafts, shapes)


def check_answers(checkpoint, engine, stages, n_drafts, shapes):
    """Batches, chunks, shared prefixes, rules, drafts right and wrong, pages too few for all."""
    config = engine.config
    limits = changed(limits_of(plan(checkpoint, n_drafts), config), min_acceptance=0.0)
    requests = requests_of(shapes, config.vocab_size)
    plainly = limits_of(plan(checkpoint, 0, prefix_snapshots=0), config)
    alone = {}
    for r in requests:
        poison(engine)
        alone |= drive([engine], plainly, [r])[0]
    for stage in stages:
        poison(stage)
    together, scheduler = drive(stages, limits, requests, lucky(alone, n_drafts))
    assert together == alone
    if sum(r.max_tokens for r in requests) > 20:
        assert scheduler.counters.accepted


def test_trap_t51_prefixes_are_found_in_whole_pages_and_pages_are_given_up(
    checkpoint, engine, n_drafts
):
    """What the property above relies on does happen: hits, and requests sent back."""
    config = engine.config
    limits = limits_of(plan(checkpoint, n_drafts, cache_tokens=LENGTH), config)
    assert limits.page_tokens % math.lcm(*filter(None, config.compress_ratios)) == 0
    requests = [
        Request(
            id=n,
            prompt_ids=prompt(5, 300, n, 76, config.vocab_size),  # 256 are found
            max_tokens=12,
            sampling=GREEDY,
        )
        for n in range(4)
    ]
    poison(engine)
    together, scheduler = drive([engine], limits, requests)
    assert scheduler.counters.cached_tokens >= 2 * 256
    assert scheduler.counters.preempted >= 1
    poison(engine)
    plainly = limits_of(plan(checkpoint, 0, prefix_snapshots=0), config)
    assert together[3] == drive([engine], plainly, [requests[3]])[0][3]


def test_trap_t23_rejected_drafts_leave_nothing_in_caches_and_states(checkpoint, engine, n_drafts):
    """Every guess is wrong, over the ends of rows of 4 and of 128 tokens."""
    config = engine.config
    limits = changed(limits_of(plan(checkpoint, n_drafts), config), min_acceptance=0.0)
    ids = prompt(2, 0, 3, 119, config.vocab_size)
    request = Request(id=0, prompt_ids=ids, max_tokens=20, sampling=GREEDY)
    poison(engine)
    plainly = limits_of(plan(checkpoint, 0, prefix_snapshots=0), config)
    alone = drive([engine], plainly, [request])[0]
    poison(engine)

    def wrong(sampled, n):
        truth = [*alone[0], 0, 0, 0, 0, 0][n : n + n_drafts]
        return [(t + 1) % config.vocab_size for t in truth]

    got, scheduler = drive([engine], limits, [request], wrong)
    assert got == alone
    assert scheduler.counters.accepted == 0
    assert scheduler.counters.drafts >= 15  # not where a page ends


def test_trap_t50_guesses_are_the_drafters_for_the_whole_sequence(checkpoint, engine, n_drafts):
    """Step by step, with wrong guesses in between, it sees what it would see at once."""
    config = engine.config
    limits = changed(limits_of(plan(checkpoint, n_drafts), config), min_acceptance=0.0)
    ids = prompt(1, 0, 7, 170, config.vocab_size)
    seen = {}

    def note(sampled, n):
        if sampled.drafts:
            seen[n] = sampled.drafts
        return sampled.drafts

    poison(engine)
    tokens, scheduler = drive(
        [engine], limits, [Request(id=0, prompt_ids=ids, max_tokens=9, sampling=GREEDY)], note
    )
    assert scheduler.counters.drafted >= 4
    whole = torch.tensor([*ids, *tokens[0]])
    poison(engine)
    fresh = KVCache(
        config,
        n_slots=1,
        max_model_len=LENGTH,
        max_chunk=LENGTH,
        kv_record="fp32",
        index_record="fp32",
    )
    at_once = in_blocks if engine.model.dspark else ahead
    with torch.inference_mode():
        assert seen == {n: at_once(engine.model, fresh, whole, len(ids) + n - 1) for n in seen}


def ahead(model, cache, whole, n):
    """What the module says of all tokens at once, guesses and its own streams among them."""
    batch = cache.batch([Chunk(0, whole[:n].tolist(), 0)])
    streams, ids = model(batch, cache.layers), whole[: n + 1]
    while len(ids) < n + 1 + DRAFTERS["tiny"]:
        end = len(ids) - 1
        batch = cache.batch([Chunk(0, ids[:end].tolist(), 0)])
        x, logits = model.draft(streams, ids[1:], batch, cache.layers, [end - 1])
        streams, ids = torch.cat((streams, x)), torch.cat((ids, logits.argmax(-1)))
    return ids[n + 1 :].tolist()


def in_blocks(model, cache, whole, n):
    batch = cache.batch([Chunk(0, whole[:n].tolist(), 0)])
    targets = Targets(model.config.dspark, model.shard.layers)
    model(batch, cache.layers, targets.observe)
    model.dspark.take(targets.seen, batch, cache.layers[model.config.n_layers :])
    block = cache.block([0], [n], [[int(whole[n]), *[500] * 4]])
    return model.draft_blocks(block, cache.layers).ids[0].tolist()
