"""Requests, and who serves them to their end: for tests of answers that must not change."""

from collections import deque

import torch
from layouts import make_plan
from msgspec.structs import replace

from v4_ascend.runtime.messages import Rules, Sampling
from v4_ascend.runtime.scheduler import Scheduler
from v4_ascend.runtime.sequence import Request

LENGTH = 1024
GREEDY = Sampling(0.0, 1.0, 0)
DRAFTERS = {"tiny": 3, "tiny-dspark": 5}


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


def drive(
    stages,
    limits,
    requests,
    guess=lambda sampled, n: sampled.drafts,
    *,
    n_in_flight=None,
    n_groups=1,
    whole=lambda result: result,
):
    """Serve requests to their end by the engines of all stages; return tokens and the scheduler.

    `guess` may replace the drafter's, of the tokens behind the first `n`. There are as many steps
    in flight as stages: a step is laid out before the results of those before it are known.
    `whole` joins the result of a step with those of other processes.
    """
    n_in_flight = n_in_flight or len(stages)
    scheduler = Scheduler(limits, eos_id=-1, n_groups=n_groups, n_in_flight=n_in_flight)
    tokens = {r.id: [] for r in requests}
    for r in requests:
        scheduler.add(r)
    flying = deque()
    while scheduler.n_requests:
        while (step := scheduler.next_step()) is not None:
            flying.append([stage.step(step) for stage in stages][-1])
        result, n = whole(flying.popleft()), {}
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


def ruled(n_prompt, grammar=None):
    liked = dict.fromkeys((7, 8, 9), 30.0)  # of random logits the most likely ones, at first
    how = {"presence_penalty": 3.0, "frequency_penalty": 7.0, "logit_bias": liked}
    return Rules(n_prompt, **how, grammar=grammar)


def requests_of(shapes, vocab, grammar=None):
    """Make a request of each (family, shared, own, tokens to draw, has rules).

    Of one family tokens are drawn by chance. The rules make every token depend on all that were
    drawn before it.
    """
    return [
        Request(
            id=n,
            prompt_ids=prompt(family, n_shared, n, n_own, vocab),
            max_tokens=max_tokens,
            sampling=Sampling(0.8, 0.9, n) if family else GREEDY,
            rules=ruled(n_shared + n_own, grammar) if has_rules else None,
        )
        for n, (family, n_shared, n_own, max_tokens, has_rules) in enumerate(shapes)
    ]


def lucky(truth, n_drafts):
    """Return what guesses as the drafter does, or now and then the truth; all of it, or less."""

    def guess(sampled, n):
        n_right, n_all = (7 * n + 1) % (n_drafts + 1), (5 * n) % (n_drafts + 2)
        right = truth[sampled.request][n : n + n_right]
        guesses = [*right, *sampled.drafts[len(right) :]]
        return guesses[:n_all] if n % 4 else guesses

    return guess


class Noting:
    """Guesses as another does, and keeps the drafter's own, by request and tokens before them."""

    def __init__(self, guess=lambda sampled, n: sampled.drafts):
        self._guess, self.seen = guess, {}

    def __call__(self, sampled, n):
        if sampled.drafts:
            self.seen[sampled.request, n] = sampled.drafts
        return self._guess(sampled, n)
