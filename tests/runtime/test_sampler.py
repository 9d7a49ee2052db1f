"""Rules on logits, against transformers' own processors and against plain arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from v4_ascend.ops import sample
from v4_ascend.runtime.messages import Rules, Sampling, SequenceStep
from v4_ascend.runtime.sampler import Sampler

VOCAB, EOS = 50, 1
GREEDY = Sampling(0.0, 1.0, 0)


def logits_of(n, seed=0):
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def step(ids, start, *, request=1, slot=0, sampling=GREEDY, rules=None):
    return SequenceStep(request, slot, ids, start, sampling, rules)


def shaped(rules, steps, logits):
    """What a request's rules make of logits once it has been given these steps."""
    sampler = Sampler(VOCAB, EOS, torch.device("cpu"))
    for s in steps:
        sampler.take([s])
    row = logits.clone()
    sampler._shapers[0].shape(row, EOS)
    return row


def test_repetition_penalty_is_that_of_transformers():
    prompt, drawn = [3, 4, 4, 9], [9, 20]
    steps = [
        step(prompt[:2], 0, sampling=None, rules=Rules(4, prompt, repetition_penalty=1.3)),
        step(prompt[2:], 2),
        *(step([t], 4 + i) for i, t in enumerate(drawn)),
    ]
    logits = logits_of(1)[0]
    want = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + drawn]), logits[None])[0]
    rules = steps[0].rules
    assert torch.equal(shaped(rules, steps, logits), want)


def test_presence_and_frequency_count_what_was_drawn_and_not_the_prompt():
    rules = Rules(3, presence_penalty=0.5, frequency_penalty=0.25)
    steps = [step([7, 7, 8], 0, rules=rules), step([5], 3), step([5], 4), step([7], 5)]
    logits = torch.zeros(VOCAB)
    got = shaped(rules, steps, logits)
    want = torch.zeros(VOCAB)
    want[5], want[7] = -0.5 - 2 * 0.25, -0.5 - 0.25
    assert torch.equal(got, want)


@given(data=st.data(), cut=st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_a_request_that_starts_anew_goes_on_where_it_was(data, cut):
    """Rules sent again with what was drawn so far are those of a request never interrupted."""
    prompt = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))
    drawn = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=6, max_size=6))
    kind = {"presence_penalty": 0.7, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    n = len(prompt)
    whole = [step(prompt, 0, rules=Rules(n, prompt, min_tokens=6, **kind))]
    whole += [step([t], n + i) for i, t in enumerate(drawn)]
    rules = Rules(n + cut, prompt + drawn[:cut], cut, min_tokens=6, **kind)
    again = [step(prompt + drawn[:cut], 0, rules=rules)]
    again += [step([t], n + i) for i, t in enumerate(drawn) if i >= cut]
    logits = logits_of(1)[0]
    assert torch.equal(shaped(whole[0].rules, whole, logits), shaped(again[0].rules, again, logits))


def test_a_slot_forgets_the_request_before():
    sampler = Sampler(VOCAB, EOS, torch.device("cpu"))
    only = Rules(1, logit_bias={30: 100.0})
    logits = logits_of(1)
    first = [step([2], 0, rules=only)]
    sampler.take(first)
    assert sampler.draw(first, logits)[0].token_id == 30
    second = [step([2], 0, request=2)]
    sampler.take(second)
    assert sampler.draw(second, logits)[0].token_id == int(logits.argmax())


def test_logprobs_are_the_models_own_and_a_neighbour_changes_nothing():
    sampler = Sampler(VOCAB, EOS, torch.device("cpu"))
    logits = logits_of(2)
    asked = Sampling(0.0, 1.0, 0, n_logprobs=2)
    pair = [
        step([2], 0, slot=0, request=1, sampling=asked, rules=Rules(1, logit_bias={30: 100.0})),
        step([2], 0, slot=1, request=2, sampling=asked),
    ]
    sampler.take(pair)
    ruled, free = sampler.draw(pair, logits)
    want = logits.log_softmax(-1)
    assert ruled.token_id == 30
    assert ruled.logprob == pytest.approx(float(want[0, 30]))
    assert free.token_id == free.top_logprobs[0][0] == int(logits[1].argmax())


def test_the_end_is_refused_until_enough_is_drawn():
    rules = Rules(1, min_tokens=2, logit_bias={EOS: 100.0})
    sampler = Sampler(VOCAB, EOS, torch.device("cpu"))
    got = []
    ids, start = [2], 0
    for _ in range(3):
        s = [step(ids, start, rules=rules if start == 0 else None)]
        sampler.take(s)
        got.append(sampler.draw(s, torch.zeros(1, VOCAB))[0].token_id)
        start += len(ids)
        ids = got[-1:]
    assert [t == EOS for t in got] == [False, False, True]


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(5, 1, 0), (0, 1, 0.08), (12, 0.8, 0.01)])
def test_only_what_transformers_leaves_is_drawn_and_as_often(temperature, top_k, top_p, min_p):
    n = 20_000
    row = logits_of(1)
    scores = row / temperature
    if top_k:
        scores = hf.TopKLogitsWarper(top_k)(None, scores)
    if min_p:
        scores = hf.MinPLogitsWarper(min_p)(None, scores)
    if top_p < 1:
        scores = hf.TopPLogitsWarper(top_p)(None, scores)
    want = scores.softmax(-1)[0]
    drawn = sample(
        row.expand(n, -1),
        torch.full((n,), temperature),
        torch.full((n,), float(top_p)),
        torch.zeros(n, dtype=torch.int64),
        torch.arange(n),
        torch.full((n,), top_k),
        torch.full((n,), float(min_p)),
    )
    got = torch.bincount(drawn, minlength=VOCAB) / n
    assert set(got.nonzero().flatten().tolist()) <= set(want.nonzero().flatten().tolist())
    # The standard deviation of a share of n draws is sqrt(p (1 - p) / n) <= 0.0036; five of them.
    torch.testing.assert_close(got, want, atol=0.018, rtol=0)
