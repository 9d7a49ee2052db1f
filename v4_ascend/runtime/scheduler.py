"""Which requests run in the next step. Pure bookkeeping: no model, no clock, no I/O."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from v4_ascend.errors import RequestError
from v4_ascend.runtime.messages import Sampled, SequenceStep, Step, StepResult
from v4_ascend.runtime.pages import PagePool, extend_digests
from v4_ascend.runtime.sequence import Flying, Progress, Request

FinishReason = Literal["stop", "length"]
PROBATION = 256  # rounds of drafts before they are judged, and over which they are averaged


@dataclass(frozen=True)
class Token:
    """One drawn token of a request; `finish` says whether it was the last."""

    request: int
    sampled: Sampled
    finish: FinishReason | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a deployment has room for; all but the queue are of one DP group.

    `n_pages` of `page_tokens` each hold at least one request of the full length. Without
    snapshots no prefix is shared. A sequence is drafted for by up to `n_drafts` tokens a step.
    Drafts end for good once fewer than `min_acceptance` tokens a step were right of the last
    ones; none ends a group of `group_tokens`, whose state could not be taken back. Pages are
    whole groups.
    """

    n_slots: int
    max_chunk: int
    n_pages: int
    page_tokens: int
    group_tokens: int
    n_snapshots: int = 0
    n_drafts: int = 0
    min_acceptance: float = 0.3
    max_waiting: int = 256

    def new_pool(self) -> PagePool:
        """Return the pool of a DP group whose caches are empty."""
        return PagePool(self.n_pages, self.page_tokens, self.n_snapshots)


@dataclass
class Counters:
    """What happened since the start."""

    prompt_tokens: int = 0  # of requests that were given a slot
    cached_tokens: int = 0  # of them, found in the caches
    preempted: int = 0
    drafts: int = 0  # steps of a sequence that had some
    drafted: int = 0
    accepted_at: list[int] = field(default_factory=list)  # by place behind the last token

    @property
    def accepted(self) -> int:
        """Drafts that were right."""
        return sum(self.accepted_at)


class Scheduler:
    """Turn by turn: decoding first, then prompts in chunks, in at most `max_chunk` tokens a step.

    A sequence keeps its slot from its first chunk to its end, unless a page is wanted and none
    is free: then the one whose turn is latest gives up its own, and is computed anew from its
    tokens later. `n_in_flight` steps may be on their way through the stages of a pipeline: they
    share the running sequences, and follow each other chunk by chunk.
    """

    def __init__(
        self, limits: Limits, *, eos_id: int, n_groups: int = 1, n_in_flight: int = 1
    ) -> None:
        self.limits, self.eos_id, self.n_in_flight = limits, eos_id, n_in_flight
        # A chunk brings a token beside its drafts.
        self._n_drafts = min(limits.n_drafts, limits.max_chunk - 1)
        self.counters = Counters(accepted_at=[0] * self._n_drafts)
        self.drafts = self._n_drafts > 0
        self._acceptance, self._n_judged = 1.0, 0
        self.pools = [limits.new_pool() for _ in range(n_groups)]
        n = limits.n_slots
        self._free = [list(range(g * n, (g + 1) * n)) for g in range(n_groups)]
        self._waiting: list[Progress] = []  # by turn
        self._running: dict[int, Progress] = {}
        self._flying: dict[int, list[Flying]] = {}  # by step
        self._number = 0

    @property
    def n_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests with one."""
        return len(self._running)

    @property
    def n_requests(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + len(self._running)

    @property
    def cache_usage(self) -> float:
        """Part of the pages that running requests use."""
        return 1 - sum(p.n_free for p in self.pools) / sum(p.n_pages for p in self.pools)

    @property
    def n_cached(self) -> int:
        """Pages that hold a known prefix."""
        return sum(p.n_cached for p in self.pools)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: with status 429, the queue is full.
        """
        self.require_room(1)
        self._queue(Progress(request, list(request.prompt_ids)))

    def _queue(self, progress: Progress) -> None:
        insort(self._waiting, progress, key=lambda p: p.turn)

    def require_room(self, n: int) -> None:
        """Raise RequestError with status 429 unless `n` more requests may wait."""
        if len(self._waiting) + n > self.limits.max_waiting:
            raise RequestError(
                f"{len(self._waiting)} requests are waiting already; try again later", status=429
            )

    def cancel(self, request_id: int) -> None:
        """Forget a request; what a step in flight uses is freed when that ends."""
        self._waiting = [p for p in self._waiting if p.request.id != request_id]
        if (running := self._running.get(request_id)) is not None:
            running.is_cancelled = True
            self._release_unused(running)

    def next_step(self) -> Step | None:
        """Admit what fits and lay out the next step; None when there is nothing to do now."""
        if len(self._flying) >= self.n_in_flight:
            return None
        steps: list[SequenceStep] = []
        flying: list[Flying] = []
        room = self.limits.max_chunk
        share = -(-len(self._running) // self.n_in_flight)
        for turn, progress in enumerate(self._ready(share)):
            if len(steps) == share or (turn >= share and room <= 0):
                break
            if progress.slot is not None and (n := self._next_tokens(progress, room)):
                room -= self._lay_out(progress, n, steps, flying)
        while self._waiting and room > 0 and self._admit(self._waiting[0]):
            progress = self._waiting.pop(0)
            self._running[progress.request.id] = progress
            n = self._next_tokens(progress, room)
            room -= self._lay_out(progress, n, steps, flying)
        if not steps:
            return None
        self._number += 1
        self._flying[self._number] = flying
        return Step(self._number, steps, self.drafts)

    def _ready(self, share: int) -> list[Progress]:
        """Return what could run: its share that waited longest, those that decode first."""
        ready = [p for p in self._running.values() if not (p.is_drawing or p.is_cancelled)]
        ready.sort(key=lambda p: p.last_step)
        longest = sorted(ready[:share], key=lambda p: (p.n_left > 1, p.turn))
        return longest + ready[share:]

    def _next_tokens(self, progress: Progress, room: int) -> int:
        """Return how many tokens a sequence may bring: all that decode do, prompts share `room`."""
        n = progress.n_left if progress.n_left == 1 else min(progress.n_left, max(0, room))
        for cut in progress.cuts:
            if progress.n_sent < cut < progress.n_sent + n:
                return cut - progress.n_sent
        return n if self._has_pages(progress, n) else 0

    def _has_pages(self, progress: Progress, n: int) -> bool:
        """Bring a sequence the pages for `n` more tokens, if need be from a later turn's.

        One whose own turn is the latest gives up what it has: it could wait for ever.
        """
        pool, size = self._pool(progress), self.limits.page_tokens
        end = progress.n_sent + n
        # So the end of a page is met exactly too, for its snapshot.
        del progress.drafts[self.limits.group_tokens - 1 - end % self.limits.group_tokens :]
        want = -(-(end + len(progress.drafts)) // size) - len(progress.pages)
        while want > pool.n_free:
            here = [p for p in self._running.values() if self._pool(p) is pool]
            later = [p for p in here if p.turn > progress.turn and not p.n_in_flight]
            if later:
                self._send_back(max(later, key=lambda p: p.turn))
                continue
            if any(p.turn < progress.turn for p in here):
                self._send_back(progress)
            return False
        if want > 0:
            progress.pages += pool.take(want)
        return True

    def _send_back(self, progress: Progress) -> None:
        self.counters.preempted += 1
        self._release(progress)
        self._queue(progress)

    def _lay_out(
        self, progress: Progress, n: int, steps: list[SequenceStep], flying: list[Flying]
    ) -> int:
        step, part = progress.step(n, self._number + 1, self._pool(progress))
        steps.append(step)
        flying.append(part)
        return len(step.token_ids)

    def _admit(self, progress: Progress) -> bool:
        """Give a sequence a slot where most of it is cached, else where most are free."""
        groups = [g for g, free in enumerate(self._free) if free]
        if not groups:
            return False
        if self.limits.n_snapshots:
            tokens, size = progress.tokens, self.limits.page_tokens
            extend_digests(progress.digests, tokens, size, len(tokens))
        usable = {g: self.pools[g].look(progress.digests)[0] for g in groups}
        group = max(groups, key=lambda g: (usable[g], len(self._free[g])))
        try:
            n_cached = progress.begin(self._free[group][0], self.pools[group])
        except ValueError:
            return False  # until others have ended: its turn is next
        self._free[group].pop(0)
        self.counters.prompt_tokens += len(progress.tokens)
        self.counters.cached_tokens += n_cached
        return True

    def apply(self, result: StepResult) -> list[Token]:
        """Take in what a step drew; return the tokens of requests still wanted."""
        drawn: dict[int, list[Sampled]] = {}
        for sampled in result.sampled:
            drawn.setdefault(sampled.request, []).append(sampled)
        tokens = []
        for part in self._flying.pop(result.number):
            progress = part.sequence
            of_request = drawn.get(progress.request.id, [])
            n_accepted = max(0, len(of_request) - 1)
            if progress.is_cancelled:
                of_request, n_accepted = [], 0
            elif part.n_drafts:
                self._count(part.n_drafts, n_accepted)
            new = self._drawn(progress, of_request)
            progress.landed(part, n_accepted, self._pool(progress))
            if new and new[-1].finish:
                progress.is_cancelled = True
            elif new and self.drafts:
                self._guess(progress, of_request[-1].drafts)
            self._release_unused(progress)
            tokens += new
        return tokens

    def _drawn(self, progress: Progress, drawn: Sequence[Sampled]) -> list[Token]:
        tokens = []
        for sampled in drawn:
            progress.tokens.append(sampled.token_id)
            finish: FinishReason | None = None
            if sampled.token_id == self.eos_id:
                finish = "stop"
            elif progress.n_drawn >= progress.request.max_tokens:
                finish = "length"
            tokens.append(Token(sampled.request, sampled, finish))
            if finish:
                break
        return tokens

    def _guess(self, progress: Progress, drafts: Sequence[int]) -> None:
        """Keep the drafts that could be drawn: the last token needs none behind it."""
        n = min(self._n_drafts, progress.request.max_tokens - progress.n_drawn - 1)
        progress.drafts = list(drafts[: max(0, n)])
        if not drafts:
            self._judge(0)  # the drafter ran for nothing

    def _count(self, n_drafts: int, n_accepted: int) -> None:
        self.counters.drafts += 1
        self.counters.drafted += n_drafts
        for place in range(n_accepted):
            self.counters.accepted_at[place] += 1
        self._judge(n_accepted)

    def _judge(self, n_accepted: int) -> None:
        """Take in a round; where too few drafts are right, they cost more than they bring."""
        self._n_judged += 1
        self._acceptance += (n_accepted - self._acceptance) / PROBATION
        if self._n_judged >= PROBATION and self._acceptance < self.limits.min_acceptance:
            self.drafts = False

    def _pool(self, progress: Progress) -> PagePool:
        if progress.slot is None:
            raise ValueError(f"request {progress.request.id} has no slot")
        return self.pools[progress.slot // self.limits.n_slots]

    def abandon(self) -> list[int]:
        """Drop every request and all that is cached, as the ranks have; return the requests."""
        ids = [*self._running, *(p.request.id for p in self._waiting)]
        self._waiting.clear()
        self._flying = {}
        for progress in list(self._running.values()):
            self._release(progress)
        self.pools = [self.limits.new_pool() for _ in self.pools]
        return ids

    def _release_unused(self, progress: Progress) -> None:
        if progress.is_cancelled and not progress.n_in_flight:
            self._release(progress)

    def _release(self, progress: Progress) -> None:
        self._pool(progress).release(progress.pages)
        if progress.slot is not None:
            insort(self._free[progress.slot // self.limits.n_slots], progress.slot)
        progress.slot, progress.pages, progress.n_sent = None, [], 0
        del self._running[progress.request.id]
