"""The scheduler alone, with a model that is arithmetic and caches that are checked."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4_ascend.errors import RequestError
from v4_ascend.runtime.messages import Sampled, Sampling, StepResult
from v4_ascend.runtime.pages import PagePool, extend_digests
from v4_ascend.runtime.scheduler import PROBATION, Limits, Scheduler
from v4_ascend.runtime.sequence import Request

GREEDY = Sampling(0.0, 1.0, 0)
EOS = 1
PAGE = 4  # tokens of a page, and of an HCA group
WINDOW = 4
GROUP = 2  # tokens of a CSA group


def request(number, n_prompt, max_tokens, family=None, priority=0):
    """Requests of one family have prompts that begin alike."""
    family = number if family is None else family
    ids = [2 + (family * 7 + i) % 50 for i in range(n_prompt)]
    return Request(
        id=number, prompt_ids=ids, max_tokens=max_tokens, sampling=GREEDY, priority=priority
    )


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


def limits(n_slots, max_chunk, **more):
    full = {"n_pages": 16 * n_slots, "page_tokens": PAGE, "group_tokens": PAGE}
    return Limits(n_slots=n_slots, max_chunk=max_chunk, **(full | more))


class Ring:
    """The last tokens of a slot by position, where later ones overwrite those a turn older."""

    def __init__(self, size):
        self.size, self.rows = size, {}

    def write(self, position, token):
        self.rows[position % self.size] = (position, token)

    def require(self, first, tokens):
        for position, token in enumerate(tokens, first):
            assert self.rows.get(position % self.size) == (position, token)

    def copy(self):
        other = Ring(self.size)
        other.rows = dict(self.rows)
        return other


class Machine:
    """Caches as the ranks have them: pages by table, and beside them rings in each slot.

    A token is drawn from what the pages hold, and everything beside them that computing it would
    need must be there: the window, the CSA group before, the HCA group begun.
    """

    def __init__(self, limits, n_groups=1, guess=lambda ids, n: [2] * n):
        self.limits, self.guess = limits, guess
        self.page, self.group = limits.page_tokens, limits.group_tokens
        self.pages = [{} for _ in range(n_groups)]  # (page, offset) -> token
        self.tables = {}
        self.rings, self.snapshots = {}, {}

    def run(self, step):
        n = self.limits.n_slots
        assert len({s.slot for s in step.sequences}) == len(step.sequences)
        decoding = [s for s in step.sequences if len(s.token_ids) - s.n_drafts == 1]
        others = sum(len(s.token_ids) for s in step.sequences if s not in decoding)
        assert others <= max(0, self.limits.max_chunk - len(decoding))
        sampled = []
        for s in step.sequences:
            assert len(s.token_ids) <= self.limits.max_chunk
            group, pages = s.slot // n, self.pages[s.slot // n]
            table = self.tables.setdefault(s.slot, {})
            table |= dict(enumerate(s.pages, s.first_page))
            assert all(0 <= p < self.limits.n_pages for p in s.pages)
            rings = self.rings.setdefault(s.slot, {})
            if s.restore is not None:
                n_tokens, kept = self.snapshots[group, s.restore]
                assert n_tokens == s.start
                rings |= {name: ring.copy() for name, ring in kept.items()}
            elif s.start == 0:
                rows = 2 * GROUP - 1 + max(1, self.limits.n_drafts)
                rings |= {"csa": Ring(rows), "hca": Ring(self.group)}
                rings["window"] = Ring(WINDOW + self.limits.max_chunk + WINDOW)
            else:
                assert s.first_page or not s.pages
            before = [pages[table[p // self.page], p % self.page] for p in range(s.start)]
            group_before = max(s.start // GROUP - 1, 0) * GROUP
            rings["csa"].require(group_before, before[group_before:])
            begun = s.start // self.group * self.group
            rings["hca"].require(begun, before[begun:])
            for p, token in enumerate(s.token_ids, s.start):
                pages[table[p // self.page], p % self.page] = token
                for ring in rings.values():
                    ring.write(p, token)
            ids = before + list(s.token_ids)
            first = max(0, s.start - WINDOW + 1)
            rings["window"].require(first, ids[first:])
            if s.save is not None:
                n_tokens = len(ids) - s.n_drafts
                assert n_tokens % self.page == 0
                kept = {name: ring.copy() for name, ring in rings.items() if name != "hca"}
                self.snapshots[group, s.save] = n_tokens, kept | {"hca": Ring(self.group)}
            if s.sampling:
                sampled += self.draw(s, ids)
            else:
                assert s.n_drafts == 0
        return StepResult(step.number, sampled)

    def draw(self, s, ids):
        n, out = len(ids) - s.n_drafts, []
        drafts = ids[n:]
        for i in range(s.n_drafts + 1):
            token = next_token(ids[: n + i])
            guesses = self.guess([*ids[: n + i], token], self.limits.n_drafts)
            out.append(Sampled(s.request, token, None, [], None, guesses))
            if i == s.n_drafts or token != drafts[i]:
                return out
        raise AssertionError


def run(scheduler, machine, on_step=lambda number: None):
    got, finished, number, flying = {}, [], 0, deque()
    while scheduler.n_requests:
        while (step := scheduler.next_step()) is not None:
            on_step(number)
            number += 1
            assert number < 3000
            flying.append(machine.run(step))
        for token in scheduler.apply(flying.popleft()):
            got.setdefault(token.request, []).append(token.sampled.token_id)
            if token.finish:
                finished.append(token.request)
    assert scheduler.n_requests == 0
    assert len(set(finished)) == len(finished)
    for pool in scheduler.pools:
        assert pool.n_free == pool.n_pages
    return got, finished


SHAPES = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=12
)


@settings(max_examples=300, deadline=None)
@given(
    shapes=SHAPES,
    n_slots=st.integers(1, 4),
    max_chunk=st.integers(1, 12),
    n_pages=st.integers(8, 20),
    n_snapshots=st.integers(0, 4),
    n_drafts=st.integers(0, 5),
    page=st.sampled_from([(4, 4), (8, 8), (16, 8)]),
    luck=st.integers(1, 4),
    cancelled=st.sets(st.integers(0, 11)),
    when=st.integers(0, 9),
    n_groups=st.integers(1, 2),
    n_in_flight=st.integers(1, 3),
)
def test_every_request_ends_once_with_the_tokens_it_gets_alone(
    shapes,
    n_slots,
    max_chunk,
    n_pages,
    n_snapshots,
    n_drafts,
    page,
    luck,
    cancelled,
    when,
    n_groups,
    n_in_flight,
):
    """However few pages and snapshots there are, and however many guesses are right.

    Steps in flight are computed in their order, and laid out before those in front are known.
    """
    more = {"n_pages": n_pages, "n_snapshots": n_snapshots, "n_drafts": n_drafts}
    more |= dict(zip(("page_tokens", "group_tokens"), page, strict=True))
    room = limits(n_slots, max_chunk, min_acceptance=0.0, **more)
    scheduler = Scheduler(room, eos_id=EOS, n_groups=n_groups, n_in_flight=n_in_flight)

    def guess(ids, n):
        """Now and then none, or fewer than there may be, or more right than wrong ones."""
        guesses, n = [], (len(ids) * 3) % (n + 1)
        for _ in range(n):
            right = len(ids) % 5 and len(ids) % luck == 0 or len(guesses) < len(ids) % 4
            guesses.append(next_token([*ids, *guesses]) if right else 2)
        return guesses

    machine = Machine(room, n_groups, guess=guess)
    requests = [request(n, *shape) for n, shape in enumerate(shapes)]
    for r in requests:
        scheduler.add(r)

    def on_step(number):
        if number == when:
            for c in cancelled:
                scheduler.cancel(c)

    got, finished = run(scheduler, machine, on_step)
    for r in requests:
        if r.id in finished:
            assert got[r.id] == alone(r)
        else:
            assert r.id in cancelled
            assert got.get(r.id, []) == alone(r)[: len(got.get(r.id, []))]


def test_first_come_first_served_but_for_priorities():
    scheduler = Scheduler(limits(1, 8), eos_id=EOS)
    for n in range(3):
        scheduler.add(request(n, 2, 1))
    scheduler.add(request(3, 2, 1, priority=-1))
    machine, order = Machine(scheduler.limits), []
    while (step := scheduler.next_step()) is not None:
        order += [t.request for t in scheduler.apply(machine.run(step))]
    assert order == [3, 0, 1, 2]


def test_a_full_queue_is_refused_with_429():
    scheduler = Scheduler(limits(1, 8, max_waiting=1), eos_id=EOS)
    scheduler.add(request(0, 2, 1))
    with pytest.raises(RequestError, match="1 requests are waiting") as e:
        scheduler.add(request(1, 2, 1))
    assert e.value.status == 429


def test_prompts_in_chunks_and_decoding_share_steps():
    scheduler = Scheduler(limits(3, 4), eos_id=EOS)
    machine = Machine(scheduler.limits)
    scheduler.add(request(0, 1, 9))
    scheduler.apply(machine.run(scheduler.next_step()))
    scheduler.add(request(1, 10, 1))
    scheduler.add(request(2, 10, 1))
    step = scheduler.next_step()
    assert [len(s.token_ids) for s in step.sequences] == [1, 3]  # four tokens in all
    assert step.sequences[1].sampling is None


def test_the_latest_turn_gives_up_its_pages_and_gets_its_answer_later():
    """Four pages: two requests begin, and grow until only one has room."""
    scheduler = Scheduler(limits(2, 8, n_pages=4), eos_id=-1)
    wanted = [request(n, 4, 11) for n in range(2)]
    for r in wanted:
        scheduler.add(r)
    got, finished = run(scheduler, Machine(scheduler.limits))
    assert finished == [0, 1]
    assert scheduler.counters.preempted == 1
    assert [len(got[n]) for n in range(2)] == [11, 11]


def test_a_known_prefix_is_computed_once():
    """The second leaves the first's way where nothing was kept; the third goes on from there."""
    scheduler = Scheduler(limits(1, 64, n_snapshots=8), eos_id=EOS)
    machine = Machine(scheduler.limits)
    shared = [7] * (3 * PAGE)
    begun = []
    for n in range(3):
        ids = [*shared, *[10 + n] * (2 * PAGE + 1)]
        scheduler.add(Request(id=n, prompt_ids=ids, max_tokens=1, sampling=GREEDY))
        step = scheduler.next_step()
        begun.append(step.sequences[0].start)
        while step is not None:
            scheduler.apply(machine.run(step))
            step = scheduler.next_step()
    assert begun == [0, 0, 3 * PAGE]
    scheduler.add(Request(id=9, prompt_ids=[*ids, 5], max_tokens=1, sampling=GREEDY))
    assert scheduler.next_step().sequences[0].start == 5 * PAGE
    assert (scheduler.counters.prompt_tokens, scheduler.counters.cached_tokens) == (85, 32)


def test_an_answer_is_a_prefix_of_the_next_turn():
    scheduler = Scheduler(limits(1, 64, n_snapshots=8), eos_id=-1)
    machine = Machine(scheduler.limits)
    scheduler.add(request(0, 6, 7))
    got, _ = run(scheduler, machine)
    turn = [*request(0, 6, 7).prompt_ids, *got[0], 30, 31]
    scheduler.add(Request(id=1, prompt_ids=turn, max_tokens=1, sampling=GREEDY))
    assert scheduler.next_step().sequences[0].start == 12  # 13 tokens, the last of them not run


def test_nothing_is_found_in_caches_that_were_lost():
    scheduler = Scheduler(limits(1, 64, n_snapshots=8), eos_id=EOS)
    scheduler.add(request(0, 20, 1))
    run(scheduler, Machine(scheduler.limits))
    assert scheduler.pools[0].n_cached == 5
    scheduler.abandon()
    scheduler.add(request(1, 20, 1, family=0))
    assert scheduler.next_step().sequences[0].start == 0


@pytest.mark.parametrize("n_drafts", [1, 4])
@pytest.mark.parametrize("is_right", [True, False])
def test_drafts_that_are_rarely_right_end_for_good(is_right, n_drafts):
    room = limits(1, 8, n_drafts=n_drafts, n_pages=999, page_tokens=8, group_tokens=8)
    scheduler = Scheduler(room, eos_id=-1)

    def guess(ids, n):
        guesses = []
        for _ in range(n):
            guesses.append(next_token([*ids, *guesses]) if is_right else 0)
        return guesses

    machine = Machine(scheduler.limits, guess=guess)
    scheduler.add(request(0, 3, 2 * PROBATION + 100))
    run(scheduler, machine)
    assert scheduler.drafts is is_right
    c = scheduler.counters
    assert c.accepted == (c.drafted if is_right else 0)
    assert c.accepted_at[0] == (c.drafts if is_right else 0)
    assert c.drafted >= (400 if n_drafts == 4 else PROBATION * (0.5 if is_right else 1))


def test_a_drafter_that_is_never_sure_ends_too():
    scheduler = Scheduler(limits(1, 8, n_drafts=4, n_pages=999), eos_id=-1)
    scheduler.add(request(0, 3, PROBATION + 100))
    run(scheduler, Machine(scheduler.limits, guess=lambda ids, n: []))
    assert not scheduler.drafts
    assert (scheduler.counters.drafts, scheduler.counters.drafted) == (0, 0)


def test_drafts_stop_in_front_of_a_groups_end_and_of_the_last_token():
    room = limits(1, 8, n_drafts=5, page_tokens=16, group_tokens=8)
    scheduler = Scheduler(room, eos_id=-1)
    machine = Machine(room, guess=lambda ids, n: [0] * n)
    scheduler.add(request(0, 3, 9))
    seen = []
    while (step := scheduler.next_step()) is not None:
        (s,) = step.sequences
        seen.append((s.start, s.n_drafts))
        scheduler.apply(machine.run(step))
    # A group ends in front of position 8; the ninth token drawn is the last.
    assert seen == [(0, 0), (3, 3), (4, 2), (5, 1), (6, 0), (7, 3), (8, 2), (9, 1), (10, 0)]


@settings(max_examples=100, deadline=None)
@given(
    shapes=SHAPES,
    n_in_flight=st.integers(1, 4),
    n_groups=st.integers(1, 3),
    n_snapshots=st.integers(0, 4),
)
def test_steps_in_flight_never_share_a_sequence_that_draws(
    shapes, n_in_flight, n_groups, n_snapshots
):
    room = limits(2, 5, n_pages=10, n_snapshots=n_snapshots)
    scheduler = Scheduler(room, eos_id=EOS, n_groups=n_groups, n_in_flight=n_in_flight)
    machine, flying = Machine(room, n_groups), []
    wanted = [request(n, *shape) for n, shape in enumerate(shapes)]
    for r in wanted:
        scheduler.add(r)
    seen, most = {r.id: [] for r in wanted}, 0
    while True:
        while (step := scheduler.next_step()) is not None:
            flying.append(step)
            most = max(most, len(flying))
            drawing = [s.request for f in flying for s in f.sequences if s.sampling]
            assert len(set(drawing)) == len(drawing)
        if not flying:
            break
        for token in scheduler.apply(machine.run(flying.pop(0))):
            seen[token.request].append(token.sampled.token_id)
    assert scheduler.n_requests == 0
    assert most <= n_in_flight
    assert seen == {r.id: alone(r) for r in wanted}


def _digest(digests, tokens):
    extend_digests(digests, tokens, PAGE, len(tokens))


def test_equal_digests_mean_equal_prefixes():
    """The same page behind another one is another prefix."""
    a, b = [], []
    _digest(a, [1] * PAGE + [2] * PAGE)
    _digest(b, [3] * PAGE + [2] * PAGE)
    assert len({*a, *b}) == 4
    _digest(a, [1] * PAGE + [2] * PAGE + [4] * (PAGE - 1))
    assert len(a) == 2


def test_pages_unused_for_longest_are_forgotten_first():
    pool = PagePool(4, PAGE, 2)
    first, second = pool.take(2), pool.take(2)
    for page in (*first, *second):
        pool.publish(bytes([page]), page)
    pool.publish_snapshot(bytes([first[1]]), pool.reserve_snapshot(b"x"))
    pool.release(first)
    pool.release(second)
    assert pool.take(1) == [first[1]]  # the end of the older prefix, and with it its snapshot
    assert pool.look([bytes([p]) for p in first]) == (0, 1)
    with pytest.raises(ValueError, match="4 pages wanted, 3 of 4 are free"):
        pool.take(4)
