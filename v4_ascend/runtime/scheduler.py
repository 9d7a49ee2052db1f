"""Which requests run in the next step. Pure bookkeeping: no model, no clock, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from v4_ascend.errors import RequestError
from v4_ascend.runtime.messages import Rules, Sampled, Sampling, SequenceStep, Step, StepResult

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asked for, in tokens."""

    id: int
    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    rules: Rules | None = None


@dataclass(frozen=True)
class Token:
    """One drawn token of a request; `finish` says whether it was the last."""

    request: int
    sampled: Sampled
    finish: FinishReason | None


@dataclass
class _Running:
    request: Request
    slot: int
    n_sent: int = 0  # tokens given to steps; earlier steps end before later ones
    n_in_flight: int = 0
    is_drawing: bool = False  # a step in flight draws its next token
    is_cancelled: bool = False
    last_step: int = 0
    drawn: list[int] = field(default_factory=list)

    def next_step(self, max_chunk: int, number: int) -> SequenceStep:
        r, n_prompt = self.request, len(self.request.prompt_ids)
        if self.n_sent < n_prompt:
            ids = list(r.prompt_ids[self.n_sent : self.n_sent + max_chunk])
            is_last = self.n_sent + len(ids) == n_prompt
            sampling = r.sampling if is_last else None
        else:
            ids, sampling = self.drawn[-1:], r.sampling
        rules = r.rules if not self.last_step else None  # its first step here
        step = SequenceStep(r.id, self.slot, ids, self.n_sent, sampling, rules)
        self.n_sent += len(ids)
        self.n_in_flight += 1
        self.is_drawing, self.last_step = sampling is not None, number
        return step


class Scheduler:
    """First come, first served; prompts in chunks beside the others' decoding.

    A slot belongs to one request from its first chunk to its end; requests go to the DP group
    with the most free slots. `n_in_flight` steps may be on their way through the stages of a
    pipeline: they share the running requests, and follow each other chunk by chunk.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_chunk: int,
        max_waiting: int,
        eos_id: int,
        n_groups: int = 1,
        n_in_flight: int = 1,
    ) -> None:
        self.max_chunk, self.max_waiting, self.eos_id = max_chunk, max_waiting, eos_id
        self.n_in_flight, self._per_group = n_in_flight, -(-max_batch_size // n_groups)
        self._free = [
            list(range(g * self._per_group, (g + 1) * self._per_group)) for g in range(n_groups)
        ]
        self._waiting: deque[Request] = deque()
        self._running: dict[int, _Running] = {}
        self._flying: dict[int, list[int]] = {}  # step -> its requests
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

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: with status 429, the queue is full.
        """
        self.require_room(1)
        self._waiting.append(request)

    def require_room(self, n: int) -> None:
        """Raise RequestError with status 429 unless `n` more requests may wait."""
        if len(self._waiting) + n > self.max_waiting:
            raise RequestError(
                f"{len(self._waiting)} requests are waiting already; try again later", status=429
            )

    def cancel(self, request_id: int) -> None:
        """Forget a request; a slot in a step in flight is freed when that ends."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        if (running := self._running.get(request_id)) is not None:
            running.is_cancelled = True
            self._release_unused(request_id)

    def next_step(self) -> Step | None:
        """Admit what fits and lay out the next step; None when there is nothing to do now."""
        if len(self._flying) >= self.n_in_flight:
            return None
        while self._waiting and any(self._free):
            slot = max(self._free, key=len).pop(0)
            request = self._waiting.popleft()
            self._running[request.id] = _Running(request, slot)
        ready = [r for r in self._running.values() if not (r.is_drawing or r.is_cancelled)]
        if not ready:
            return None
        self._number += 1
        share = -(-len(self._running) // self.n_in_flight)
        longest = {r.slot for r in sorted(ready, key=lambda r: r.last_step)[:share]}
        chosen = [r for r in ready if r.slot in longest]
        self._flying[self._number] = [r.request.id for r in chosen]
        return Step(self._number, [r.next_step(self.max_chunk, self._number) for r in chosen])

    def apply(self, result: StepResult) -> list[Token]:
        """Take in what a step drew; return the tokens of requests still wanted."""
        for request_id in self._flying.pop(result.number):
            running = self._running[request_id]
            running.n_in_flight -= 1
            running.is_drawing = running.is_drawing and running.n_in_flight > 0
            self._release_unused(request_id)
        return [self._drawn(s) for s in result.sampled if self._is_wanted(s.request)]

    def _is_wanted(self, request_id: int) -> bool:
        running = self._running.get(request_id)
        return running is not None and not running.is_cancelled

    def abandon(self) -> list[int]:
        """Drop every request, as when the ranks died; return their ids."""
        ids = [*self._running, *(r.id for r in self._waiting)]
        self._waiting.clear()
        self._flying = {}
        for request_id in list(self._running):
            self._release(request_id)
        return ids

    def _drawn(self, sampled: Sampled) -> Token:
        running = self._running[sampled.request]
        running.drawn.append(sampled.token_id)
        finish: FinishReason | None = None
        if sampled.token_id == self.eos_id:
            finish = "stop"
        elif len(running.drawn) >= running.request.max_tokens:
            finish = "length"
        if finish:
            self._release(sampled.request)
        return Token(sampled.request, sampled, finish)

    def _release_unused(self, request_id: int) -> None:
        running = self._running[request_id]
        if running.is_cancelled and not running.n_in_flight:
            self._release(request_id)

    def _release(self, request_id: int) -> None:
        slot = self._running.pop(request_id).slot
        self._free[slot // self._per_group].append(slot)
