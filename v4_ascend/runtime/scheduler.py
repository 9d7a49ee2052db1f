"""Which requests run in the next step. Pure bookkeeping: no model, no clock, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from v4_ascend.errors import RequestError
from v4_ascend.runtime.messages import Sampled, Sampling, SequenceStep, Step, StepResult

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asked for, in tokens."""

    id: int
    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling


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
    n_done: int = 0  # tokens in the slot's caches
    drawn: list[int] = field(default_factory=list)

    def next_step(self, max_chunk: int) -> SequenceStep:
        r, n_prompt = self.request, len(self.request.prompt_ids)
        if self.n_done < n_prompt:
            ids = list(r.prompt_ids[self.n_done : self.n_done + max_chunk])
            is_last = self.n_done + len(ids) == n_prompt
            sampling = r.sampling if is_last else None
        else:
            ids, sampling = self.drawn[-1:], r.sampling
        return SequenceStep(r.id, self.slot, ids, self.n_done, sampling)


class Scheduler:
    """First come, first served; prompts in chunks beside the others' decoding.

    A slot belongs to one request from its first chunk to its end.
    """

    def __init__(
        self, *, max_batch_size: int, max_chunk: int, max_waiting: int, eos_id: int
    ) -> None:
        self.max_chunk, self.max_waiting, self.eos_id = max_chunk, max_waiting, eos_id
        self._free = list(range(max_batch_size))
        self._waiting: deque[Request] = deque()
        self._running: dict[int, _Running] = {}
        self._in_step: dict[int, int] = {}  # request -> tokens the step in flight adds
        self._cancelled: set[int] = set()
        self._number = 0

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
        """Forget a request; a slot in the step in flight is freed when that ends."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        if request_id in self._in_step:
            self._cancelled.add(request_id)
        elif request_id in self._running:
            self._release(request_id)

    def next_step(self) -> Step | None:
        """Admit what fits and lay out the next step; None when there is nothing to do."""
        while self._waiting and self._free:
            request = self._waiting.popleft()
            self._running[request.id] = _Running(request, self._free.pop(0))
        steps = [r.next_step(self.max_chunk) for r in self._running.values()]
        self._in_step = {s.request: len(s.token_ids) for s in steps}
        self._number += 1
        return Step(self._number, steps) if steps else None

    def apply(self, result: StepResult) -> list[Token]:
        """Take in what the step drew; return the tokens of requests still wanted."""
        for request_id, n_tokens in self._in_step.items():
            self._running[request_id].n_done += n_tokens
        self._in_step = {}
        for request_id in self._cancelled:
            self._release(request_id)
        self._cancelled = set()
        return [self._drawn(s) for s in result.sampled if s.request in self._running]

    def abandon(self) -> list[int]:
        """Drop every request, as when the ranks died; return their ids."""
        ids = [*self._running, *(r.id for r in self._waiting)]
        self._waiting.clear()
        self._in_step, self._cancelled = {}, set()
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

    def _release(self, request_id: int) -> None:
        self._free.append(self._running.pop(request_id).slot)
