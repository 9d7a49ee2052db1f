"""Between requests and ranks: steps in flight, tokens to their requests, ranks watched."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from v4_ascend.config.private import private_opener
from v4_ascend.errors import RequestError
from v4_ascend.runtime.link import FrontLink
from v4_ascend.runtime.messages import (
    Beat,
    ExpertCounts,
    Hello,
    Loading,
    OperatorTimes,
    Ready,
    Rules,
    Sampling,
    Start,
    StepResult,
)
from v4_ascend.runtime.scheduler import Scheduler, Token
from v4_ascend.runtime.sequence import Request
from v4_ascend.runtime.watch import RankState, Watch
from v4_ascend.supernode.plan import Plan, experts_of

WATCH_SECONDS = 0.1


@dataclass
class Health:
    """What `/ready` says."""

    state: str = "starting"
    is_ready: bool = False
    canary: str | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    reason: str | None = None
    is_open: bool = False  # whether the front listens at the deployment's address


@dataclass
class Dispatcher:
    """Owns the scheduler and the link; everything runs on one event loop."""

    scheduler: Scheduler
    state: Path
    plan: Plan
    health: Health = field(default_factory=Health)
    observe_step: Callable[[float], None] = lambda _: None  # sees the seconds of each step
    observe_operators: Callable[[int, OperatorTimes], None] = lambda *_: None  # and of which stage

    def __post_init__(self) -> None:
        self.watch = Watch(self.plan)
        # The address that other hosts reach this one by, where its name is no such address.
        own = os.environ.get("V4_ASCEND_ADDRESS") or self.plan.ranks[0].host
        self.link = FrontLink(self.state, "127.0.0.1" if all(self.watch.is_local) else own)
        self._ids = itertools.count()
        self._attempt = 0
        self._queues: dict[int, asyncio.Queue[Token | RequestError]] = {}
        self._work = asyncio.Event()
        self._parts: dict[int, list[StepResult]] = {}
        self._sent: dict[int, float] = {}  # step -> when
        self._was_ready = False
        self._n_answers = self.plan.parallel.dp_size  # of each step: one rank of each DP group

    def drain(self) -> None:
        """From now on answer new requests with 503; those that are here go on."""
        self.health.is_ready, self.health.state = False, "draining"

    def give_way(self) -> None:
        """Say that others take new clients; whoever still asks here is answered."""
        self.health.is_open, self.health.state = False, "draining"

    def stop(self, reason: str) -> None:
        """End what still runs; who waits for it is told."""
        for request_id in self._queues:
            self._refuse(request_id, RequestError(reason, status=503))

    def _refuse(self, request_id: int, error: RequestError) -> None:
        if request_id in self._queues:
            self._queues[request_id].put_nowait(error)

    @property
    def is_idle(self) -> bool:
        """Whether every request has its answer."""
        return not self._queues

    async def run(self) -> None:
        """Bring the ranks up, then run steps until cancelled.

        A failure in here is a failure of the deployment, and `/ready` says so.
        """
        tasks = [asyncio.create_task(t) for t in (self._send_steps(), self._listen())]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            await asyncio.gather(self._watch(), *tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(f"{type(error).__name__}: {error}", may_restart=False)

    def require_room(self, n: int) -> None:
        """Refuse before a response has begun what could not be served.

        Raises:
            RequestError: the ranks are not there (503), or the queue is full (429).
        """
        if not self.health.is_ready:
            raise RequestError(f"not ready: {self.health.reason or self.health.state}", status=503)
        self.scheduler.require_room(n)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        rules: Rules | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Token]:
        """Yield tokens as they are drawn; leaving the iterator early frees the slot.

        Raises:
            RequestError: the queue is full (429), the ranks are not there (503) or died (500), or
                the time is up (408).
        """
        self.require_room(1)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        request_id = next(self._ids)
        self.scheduler.add(
            Request(
                id=request_id,
                prompt_ids=prompt_ids,
                max_tokens=max_tokens,
                sampling=sampling,
                rules=rules,
                priority=priority,
            )
        )
        queue: asyncio.Queue[Token | RequestError] = asyncio.Queue()
        self._queues[request_id] = queue
        self._work.set()
        try:
            while True:
                token = await _next(queue, deadline, timeout_s)
                if isinstance(token, RequestError):
                    raise token
                yield token
                if token.finish:
                    return
        finally:
            self._queues.pop(request_id, None)
            self.scheduler.cancel(request_id)

    async def _watch(self) -> None:
        """Notice a rank that ended without a word, does not answer, or keeps all others waiting."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            oldest = min(self._sent, default=None)
            sent = self._sent[oldest] if oldest is not None else 0.0
            verdict = self.watch.look(time.monotonic(), oldest, sent)
            if verdict is None:
                if self.health.is_ready:
                    self.health.reason = None  # whoever was silent is back
                continue
            reason = f"{self.watch.name(verdict.rank)} {verdict.reason}"
            if verdict.action == "name":
                self.health.reason = reason
                continue
            pid = self.watch.ranks[verdict.rank].pid
            self._lose(reason)
            if verdict.action == "end":
                await self.link.end(reason, range(self.plan.parallel.world_size))
                if self.watch.is_local[verdict.rank]:  # it may be stopped, and hears nothing
                    os.kill(pid, signal.SIGKILL)
            else:
                await self._end_elsewhere(verdict.rank, reason)

    async def _end_elsewhere(self, rank: int, reason: str) -> None:
        """Let other hosts' ranks start again too: a host's torchrun knows of its own alone."""
        host = self.plan.ranks[rank].host
        await self.link.end(reason, [r.rank for r in self.plan.ranks if r.host != host])

    async def _send_steps(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._was_ready and (step := self.scheduler.next_step()) is not None:
                self._parts[step.number], self._sent[step.number] = [], time.monotonic()
                await self.link.send(step, self.plan.parallel.world_size)

    async def _listen(self) -> None:
        while True:
            rank, message = await self.link.receive()
            known = self.watch.ranks.get(rank)
            if isinstance(message, Hello):
                await self._greet(rank, message)
            elif known is None:
                continue  # of a rank that was lost
            elif isinstance(message, Beat):
                known.take(message, time.monotonic())
            elif isinstance(message, ExpertCounts):
                known.counts = message.counts
            elif isinstance(message, OperatorTimes):
                self.observe_operators(rank // self.plan.parallel.stage_size, message)
            elif isinstance(message, Loading):
                known.loaded, known.total = message.done, message.total
                ranks = self.watch.ranks.values()
                self.health.loaded_bytes = sum(r.loaded for r in ranks)
                self.health.total_bytes = sum(r.total for r in ranks)
                is_done = self.health.loaded_bytes == self.health.total_bytes
                self.health.state = "canary" if is_done else "loading"
            elif isinstance(message, Ready):
                self._rank_is_ready(known, message)
            elif isinstance(message, StepResult):
                self._add(message)
            else:
                self.watch.failed(rank, message.reason, time.monotonic())

    async def _greet(self, rank: int, hello: Hello) -> None:
        known = self.watch.ranks.get(rank)
        if known is not None and known.pid == hello.pid:
            return  # its heartbeat
        if known is not None:
            reason = f"{self.watch.name(rank)} was started again (pid {hello.pid})"
            self._lose(reason)
            await self._end_elsewhere(rank, reason)
        self.watch.met(rank, hello.pid)
        if self.health.state != "failed":
            self.health.state = "loading"
        if len(self.watch.ranks) == self.plan.parallel.world_size:
            self._attempt += 1
            await self.link.send(Start(self._attempt), len(self.watch.ranks))

    def _rank_is_ready(self, rank: RankState, message: Ready) -> None:
        rank.is_ready, rank.resident = True, message.resident_bytes
        rank.n_graphs = message.n_graphs
        n_ready = sum(r.is_ready for r in self.watch.ranks.values())
        if n_ready < self.plan.parallel.world_size:
            return
        h = self.health
        h.canary, h.state, h.is_ready, h.reason = message.canary, "ready", True, None
        self._was_ready = True
        self._work.set()

    def _add(self, result: StepResult) -> None:
        """Take one rank's part of a step's result; apply the step once it is whole."""
        parts = self._parts.get(result.number)
        if parts is None:
            return  # of a step that was lost
        parts.append(result)
        if len(parts) < self._n_answers:
            return
        del self._parts[result.number]
        self.observe_step(time.monotonic() - self._sent.pop(result.number))
        whole = StepResult(result.number, [s for p in parts for s in p.sampled])
        for token in self.scheduler.apply(whole):
            if token.request in self._queues:
                failed = token.sampled.error
                self._queues[token.request].put_nowait(
                    RequestError(f"structured output: {failed}", status=500) if failed else token
                )
        self._work.set()

    def expert_load(self) -> list[list[int]]:
        """Return the rows each expert of each layer got, as ``[layer][expert]``, over all ranks."""
        plan = self.plan
        last = max(r.layers[1] for r in plan.ranks)
        held = [experts_of(plan, r) for r in plan.ranks]
        n_experts = 1 + max(e for rank in held for layer in rank for e in layer)
        total = [[0] * n_experts for _ in range(last)]
        for rank, state in self.watch.ranks.items():
            first = plan.ranks[rank].layers[0]
            for i, counts in enumerate(state.counts):
                for expert, n in zip(held[rank][i], counts, strict=True):
                    total[first + i][expert] += n
        return total

    def _write_flight(self, reason: str) -> None:
        """Add to flight.log what every rank was doing, for who asks why afterwards."""
        lines = [f"{datetime.now().astimezone().isoformat(timespec='seconds')} {reason}"]
        lines += [f"  {line}" for line in self.watch.flight(time.monotonic())]
        with open(self.state / "flight.log", "a", encoding="utf-8", opener=private_opener) as f:
            f.write("\n".join(lines) + "\n")

    def _lose(self, reason: str, *, may_restart: bool = True) -> None:
        """Answer every request with the reason; the front itself stays up for the next ranks."""
        h = self.health
        if h.state in ("failed", "restarting"):
            return
        h.is_ready, h.reason = False, reason
        h.state = "restarting" if self._was_ready and may_restart else "failed"
        self._was_ready = False
        self._write_flight(reason)
        self.watch.forget()
        self._parts, self._sent = {}, {}
        for request_id in self.scheduler.abandon():
            self._refuse(request_id, RequestError(f"the model stopped: {reason}", status=500))


async def _next(
    queue: asyncio.Queue[Token | RequestError], deadline: float | None, timeout_s: float | None
) -> Token | RequestError:
    left = None if deadline is None else deadline - time.monotonic()
    try:
        return await asyncio.wait_for(queue.get(), left)
    except TimeoutError as e:
        raise RequestError(f"timeout: {timeout_s:g} s are over", param="timeout", status=408) from e
