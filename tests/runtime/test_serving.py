"""Whatever the scheduler does with caches, answers are those each request gets alone."""

import math
from collections import deque
from dataclasses import replace as changed

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import make_plan, write_tiny
from msgspec.structs import replace

from v4_ascend.model.dspark import Targets
from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.messages import Rules, Sampling
from v4_ascend.runtime.scheduler import Scheduler
from v4_ascend.runtime.sequence import Request

LENGTH = 1024
GREEDY = Sampling(0.0, 1.0, 0)
DRAFTERS = {"tiny": 1, "tiny-dspark": 5}


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


def plan(checkpoint, n_drafts, layout=None, **changes):
    return make_plan(
        checkpoint,
        layout or {},
        kernels="reference",
        max_model_len=LENGTH,
        max_batch_size=3,
        max_chunk=160,
        cache_tokens=2 * LENGTH,
        prefix_snapshots=3,
        n_draft_tokens=n_drafts,
        min_draft_confidence=0.0,
    ).model_copy(update=changes)


def drive(stages, limits, requests, guess=lambda sampled, n: sampled.drafts):
    """Serve requests to their end by the engines of all stages; return tokens and the scheduler.

    `guess` may replace the drafter's, of the tokens behind the first `n`. There are as many steps
    in flight as stages: a step is laid out before the results of those before it are known.
    """
    scheduler = Scheduler(limits, eos_id=-1, n_in_flight=len(stages))
    tokens = {r.id: [] for r in requests}
    for r in requests:
        scheduler.add(r)
    flying = deque()
    while scheduler.n_requests:
        while (step := scheduler.next_step()) is not None:
            flying.append([stage.step(step) for stage in stages][-1])
        result, n = flying.popleft(), {}
        for i, sampled in enumerate(result.sampled):
            n[sampled.request] = n.get(sampled.request, len(tokens[sampled.request])) + 1
            result.sampled[i] = replace(sampled, drafts=guess(sampled, n[sampled.request]))
        for token in scheduler.apply(result):
            tokens[token.request].append(token.sampled.token_id)
    return tokens, scheduler


def poison(engine):
    """Leave nothing in the caches that could be read by mistake and be right by chance."""
    engine.sampler._shapers.clear()  # no deployment has a request's number twice; these tests do
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


def ruled(n_prompt):
    liked = dict.fromkeys((7, 8, 9), 30.0)  # of random logits the most likely ones, at first
    return Rules(n_prompt, presence_penalty=3.0, frequency_penalty=7.0, logit_bias=liked)


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
    """Batches, chunks, shared prefixes, rules, right and wrong drafts, and pages too few for all.

    The rules make every token depend on all that were drawn before it. Of one family of prompts
    tokens are drawn by chance.
    """
    config = engine.config
    limits = changed(limits_of(plan(checkpoint, n_drafts), config), min_acceptance=0.0)
    requests = [
        Request(
            id=n,
            prompt_ids=prompt(family, n_shared, n, n_own, config.vocab_size),
            max_tokens=max_tokens,
            sampling=Sampling(0.8, 0.9, n) if family else GREEDY,
            rules=ruled(n_shared + n_own) if has_rules else None,
        )
        for n, (family, n_shared, n_own, max_tokens, has_rules) in enumerate(shapes)
    ]
    plainly = limits_of(plan(checkpoint, 0, prefix_snapshots=0), config)
    alone = {}
    for r in requests:
        poison(engine)
        alone |= drive([engine], plainly, [r])[0]
    for stage in stages:
        poison(stage)

    def lucky(sampled, n):
        """What the drafter says, or now and then the truth; all of it, or less."""
        n_right, n_all = (7 * n + 1) % (n_drafts + 1), (5 * n) % (n_drafts + 2)
        truth = alone[sampled.request][n : n + n_right]
        guesses = [*truth, *sampled.drafts[len(truth) :]]
        return guesses[:n_all] if n % 4 else guesses

    together, scheduler = drive(stages, limits, requests, lucky)
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
    at_once = in_blocks if engine.model.dspark else one_ahead
    with torch.inference_mode():
        assert seen == {n: at_once(engine.model, fresh, whole, len(ids) + n - 1) for n in seen}


def one_ahead(model, cache, whole, n):
    batch = cache.batch([Chunk(0, whole[:n].tolist(), 0)])
    streams = model(batch, cache.layers)
    return [int(model.draft(streams, whole[1 : n + 1], batch, cache.layers)[-1].argmax())]


def in_blocks(model, cache, whole, n):
    batch = cache.batch([Chunk(0, whole[:n].tolist(), 0)])
    targets = Targets(model.config.dspark, model.shard.layers)
    model(batch, cache.layers, targets.observe)
    model.dspark.take(targets.seen, batch, cache.layers[model.config.n_layers :])
    block = cache.block([0], [n], [[int(whole[n]), *[500] * 4]])
    return model.draft_blocks(block, cache.layers).ids[0].tolist()
