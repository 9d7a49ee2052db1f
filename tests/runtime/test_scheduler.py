"""The scheduler alone, with a model that is arithmetic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4_ascend.errors import RequestError
from v4_ascend.runtime.messages import Sampled, Sampling, StepResult
from v4_ascend.runtime.scheduler import Request, Scheduler

GREEDY = Sampling(0.0, 1.0, 0)
EOS = 1


def request(number, n_prompt, max_tokens):
    ids = [2 + (number * 7 + i) % 50 for i in range(n_prompt)]
    return Request(id=number, prompt_ids=ids, max_tokens=max_tokens, sampling=GREEDY)


def next_token(ids):
    """A token, or EOS, that depends on every token before it."""
    x = 17
    for i in ids:
        x = (x * 31 + i) % 10007
    return EOS if x % 11 == 0 else 2 + x % 50


def alone(r):
    ids = list(r.prompt_ids)
    drawn = []
    while len(drawn) < r.max_tokens and EOS not in drawn:
        drawn.append(next_token(ids + drawn))
    return drawn


class Machine:
    """Caches per slot; refuses a step that does not continue what a slot holds."""

    def __init__(self, max_batch_size, max_chunk):
        self.max_batch_size, self.max_chunk = max_batch_size, max_chunk
        self.slots = {}

    def run(self, step):
        assert 0 < len(step.sequences) <= self.max_batch_size
        assert len({s.slot for s in step.sequences}) == len(step.sequences)
        sampled = []
        for s in step.sequences:
            assert 0 <= s.slot < self.max_batch_size
            assert 1 <= len(s.token_ids) <= self.max_chunk
            held = self.slots.get(s.slot, [])[: s.start]
            assert len(held) == s.start
            self.slots[s.slot] = held + s.token_ids
            if s.sampling:
                sampled.append(Sampled(s.request, next_token(self.slots[s.slot]), None, []))
        return StepResult(step.number, sampled)


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=12),
    max_batch_size=st.integers(1, 4),
    max_chunk=st.integers(1, 8),
    cancelled=st.sets(st.integers(0, 11)),
    when=st.integers(0, 9),
)
def test_every_request_ends_once_with_the_tokens_it_gets_alone(
    shapes, max_batch_size, max_chunk, cancelled, when
):
    scheduler = Scheduler(
        max_batch_size=max_batch_size, max_chunk=max_chunk, max_waiting=99, eos_id=EOS
    )
    machine = Machine(max_batch_size, max_chunk)
    requests = [request(n, *shape) for n, shape in enumerate(shapes)]
    for r in requests:
        scheduler.add(r)
    got, finished, steps = {r.id: [] for r in requests}, [], 0
    while (step := scheduler.next_step()) is not None:
        if steps == when:
            for number in cancelled:
                scheduler.cancel(number)
        steps += 1
        assert steps < 1000
        for token in scheduler.apply(machine.run(step)):
            got[token.request].append(token.sampled.token_id)
            if token.finish:
                finished.append(token.request)
    assert scheduler.n_requests == 0
    assert len(set(finished)) == len(finished)
    for r in requests:
        if r.id in finished:
            assert got[r.id] == alone(r)
        else:
            assert r.id in cancelled
            assert got[r.id] == alone(r)[: len(got[r.id])]


def test_first_come_first_served():
    scheduler = Scheduler(max_batch_size=1, max_chunk=8, max_waiting=9, eos_id=EOS)
    for n in range(3):
        scheduler.add(request(n, 2, 1))
    machine, order = Machine(1, 8), []
    while (step := scheduler.next_step()) is not None:
        order += [t.request for t in scheduler.apply(machine.run(step))]
    assert order == [0, 1, 2]


def test_a_full_queue_is_refused_with_429():
    scheduler = Scheduler(max_batch_size=1, max_chunk=8, max_waiting=1, eos_id=EOS)
    scheduler.add(request(0, 2, 1))
    with pytest.raises(RequestError, match="1 requests are waiting") as e:
        scheduler.add(request(1, 2, 1))
    assert e.value.status == 429


def test_prompts_in_chunks_and_decoding_share_steps():
    scheduler = Scheduler(max_batch_size=2, max_chunk=4, max_waiting=9, eos_id=EOS)
    machine = Machine(2, 4)
    scheduler.add(request(0, 1, 9))
    scheduler.apply(machine.run(scheduler.next_step()))
    scheduler.add(request(1, 10, 1))
    step = scheduler.next_step()
    assert [len(s.token_ids) for s in step.sequences] == [1, 4]
    assert step.sequences[1].sampling is None


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=12),
    n_in_flight=st.integers(1, 4),
    n_groups=st.integers(1, 3),
)
def test_steps_in_flight_never_share_a_sequence_that_draws(shapes, n_in_flight, n_groups):
    n_slots = 2 * n_groups
    scheduler = Scheduler(
        max_batch_size=n_slots,
        max_chunk=5,
        max_waiting=99,
        eos_id=EOS,
        n_groups=n_groups,
        n_in_flight=n_in_flight,
    )
    machine, flying = Machine(n_slots, 5), []
    wanted = [request(n, *shape) for n, shape in enumerate(shapes)]
    for r in wanted:
        scheduler.add(r)
    seen, most = {r.id: 0 for r in wanted}, 0
    while True:
        while (step := scheduler.next_step()) is not None:
            flying.append(step)
            most = max(most, len(flying))
            drawing = [s.request for f in flying for s in f.sequences if s.sampling]
            assert len(set(drawing)) == len(drawing)
        if not flying:
            break
        for token in scheduler.apply(machine.run(flying.pop(0))):
            seen[token.request] += 1
    assert scheduler.n_requests == 0
    assert most <= n_in_flight
    assert all(n >= 1 for n in seen.values())
