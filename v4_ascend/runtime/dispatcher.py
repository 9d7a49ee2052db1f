"""Between requests and ranks: steps in flight, tokens to their requests, ranks watched."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from v4_ascend.errors import RequestError
from v4_ascend.runtime.link import FrontLink, is_alive
from v4_ascend.runtime.messages import (
    Beat,
    ExpertCounts,
    Hello,
    Loading,
    Ready,
    Sampling,
    StepResult,
)
from v4_ascend.runtime.scheduler import Request, Scheduler, Token
from v4_ascend.supernode.plan import Plan, experts_of

WATCH_SECONDS = 0.1
BLAME_SECONDS = 0.5  # a rank that ended is the cause of others' failures, not they of its
SILENT_SECONDS = 5.0  # without a heartbeat
STUCK_SECONDS = 8.0  # with a step in flight and no exchange anywhere


@dataclass
class Health:
    """What `/ready` says."""

    state: str = "starting"
    is_ready: bool = False
    canary: str | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    reason: str | None = None


@dataclass
class RankState:
    """What the front knows of a rank."""

    pid: int
    loaded: int = 0
    total: int = 0
    is_ready: bool = False
    heard: float = 0.0
    moved: float = 0.0
    beat: Beat | None = None
    counts: list[list[int]] = field(default_factory=list)


@dataclass
class Dispatcher:
    """Owns the scheduler and the link; everything runs on one event loop."""

    scheduler: Scheduler
    state: Path
    plan: Plan
    health: Health = field(default_factory=Health)

    def __post_init__(self) -> None:
        self.link = FrontLink(self.state)
        self.ranks: dict[int, RankState] = {}
        self._ids = itertools.count()
        self._queues: dict[int, asyncio.Queue[Token | RequestError]] = {}
        self._work = asyncio.Event()
        self._parts: dict[int, list[StepResult]] = {}
        self._sent: dict[int, float] = {}  # step -> when
        self._failures: list[tuple[int, str, float]] = []  # rank, reason, when
        self._was_ready = False
        p = self.plan.parallel
        self._n_answers = p.dp_size * p.cp_size  # of each step: one rank of each TP group

    def drain(self) -> None:
        """From now on answer new requests with 503; those that are here go on."""
        self.health.is_ready, self.health.state = False, "draining"

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
        self, prompt_ids: Sequence[int], max_tokens: int, sampling: Sampling
    ) -> AsyncIterator[Token]:
        """Yield tokens as they are drawn; leaving the iterator early frees the slot.

        Raises:
            RequestError: the queue is full (429), the ranks are not there (503) or died (500).
        """
        self.require_room(1)
        request_id = next(self._ids)
        self.scheduler.add(
            Request(id=request_id, prompt_ids=prompt_ids, max_tokens=max_tokens, sampling=sampling)
        )
        queue: asyncio.Queue[Token | RequestError] = asyncio.Queue()
        self._queues[request_id] = queue
        self._work.set()
        try:
            while True:
                token = await queue.get()
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
            now = time.monotonic()
            failed = {rank for rank, _, _ in self._failures}
            dead = [r for r, s in self.ranks.items() if not is_alive(s.pid) and r not in failed]
            silent = [
                r for r, s in self.ranks.items() if s.heard and now - s.heard > SILENT_SECONDS
            ]
            if dead:
                self._lose(f"{self.name(dead[0])} ended (pid {self.ranks[dead[0]].pid})")
            elif self._failures and now - self._failures[0][2] > BLAME_SECONDS:
                rank, reason, _ = self._failures[0]
                self._lose(f"{self.name(rank)}: {reason}")
            elif silent:
                r = self.ranks[silent[0]]
                self.health.reason = (
                    f"{self.name(silent[0])} has not answered for {now - r.heard:.0f} s "
                    f"(pid {r.pid})"
                )
            else:
                if self.health.is_ready:
                    self.health.reason = None  # whoever was silent is back
                self._name_the_stuck(now)

    def _name_the_stuck(self, now: float) -> None:
        """Of ranks that wait for each other, the one that waits for nobody, or is behind."""
        beats = {rank: r.beat for rank, r in self.ranks.items() if r.beat is not None}
        if not self._sent or len(beats) < 2:
            return
        since = max(min(self._sent.values()), max(r.moved for r in self.ranks.values()))
        if now - since < STUCK_SECONDS:
            return
        rank = min(beats, key=lambda r: (beats[r].waiting is not None, beats[r].n_exchanges))
        others = next((b.waiting for r, b in beats.items() if r != rank and b.waiting), "nothing")
        self.health.reason = (
            f"{self.name(rank)} has kept step {min(self._sent)} for {now - since:.0f} s; "
            f"others are in {others}"
        )

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
            known = self.ranks.get(rank)
            if isinstance(message, Hello):
                self._greet(rank, message)
            elif known is None:
                continue  # of a rank that was lost
            elif isinstance(message, Beat):
                known.heard = time.monotonic()
                if known.beat is None or message.n_exchanges != known.beat.n_exchanges:
                    known.moved = known.heard
                known.beat = message
            elif isinstance(message, ExpertCounts):
                known.counts = message.counts
            elif isinstance(message, Loading):
                known.loaded, known.total = message.done, message.total
                self.health.loaded_bytes = sum(r.loaded for r in self.ranks.values())
                self.health.total_bytes = sum(r.total for r in self.ranks.values())
                is_done = self.health.loaded_bytes == self.health.total_bytes
                self.health.state = "canary" if is_done else "loading"
            elif isinstance(message, Ready):
                self._rank_is_ready(known, message)
            elif isinstance(message, StepResult):
                self._add(message)
            else:
                self._failures.append((rank, message.reason, time.monotonic()))

    def _greet(self, rank: int, hello: Hello) -> None:
        known = self.ranks.get(rank)
        if known is not None and known.pid == hello.pid:
            return  # its heartbeat
        if known is not None:
            self._lose(f"{self.name(rank)} was started again (pid {hello.pid})")
        self.ranks[rank] = RankState(hello.pid)
        if self.health.state != "failed":
            self.health.state = "loading"

    def _rank_is_ready(self, rank: RankState, message: Ready) -> None:
        rank.is_ready = True
        n_ready = sum(r.is_ready for r in self.ranks.values())
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
        del self._parts[result.number], self._sent[result.number]
        whole = StepResult(result.number, [s for p in parts for s in p.sampled])
        for token in self.scheduler.apply(whole):
            if token.request in self._queues:
                self._queues[token.request].put_nowait(token)
        self._work.set()

    def rank_rows(self) -> list[dict[str, object]]:
        """Say of each rank here what it holds, how far it is, and what it waits for."""
        rows: list[dict[str, object]] = []
        for rank, r in sorted(self.ranks.items()):
            beat = r.beat or Beat(0, 0, None)
            rows.append(
                {
                    "rank": rank,
                    "what": self.name(rank),
                    "pid": r.pid,
                    "is_ready": r.is_ready,
                    "loaded_bytes": r.loaded,
                    "step": beat.step,
                    "n_exchanges": beat.n_exchanges,
                    "waiting": beat.waiting,
                }
            )
        return rows

    def expert_load(self) -> list[list[int]]:
        """Return the rows each expert of each layer got, as ``[layer][expert]``, over all ranks."""
        plan = self.plan
        last = max(r.layers[1] for r in plan.ranks)
        held = [experts_of(plan, r) for r in plan.ranks]
        n_experts = 1 + max(e for rank in held for layer in rank for e in layer)
        total = [[0] * n_experts for _ in range(last)]
        for rank, state in self.ranks.items():
            first = plan.ranks[rank].layers[0]
            for i, counts in enumerate(state.counts):
                for expert, n in zip(held[rank][i], counts, strict=True):
                    total[first + i][expert] += n
        return total

    def name(self, rank: int) -> str:
        """Say which rank it is, and what it holds."""
        r, p = self.plan.ranks[rank], self.plan.parallel
        return (
            f"rank {rank} (stage {rank // p.stage_size}, layers {r.layers[0]} to "
            f"{r.layers[1] - 1}, experts {r.experts[0]} to {r.experts[1] - 1}, "
            f"{r.host} device {r.device})"
        )

    def _write_flight(self, reason: str) -> None:
        """Add to flight.log what every rank was doing, for who asks why afterwards."""
        now = time.monotonic()
        lines = [f"{datetime.now().astimezone().isoformat(timespec='seconds')} {reason}"]
        for rank, r in sorted(self.ranks.items()):
            beat = r.beat or Beat(0, 0, None)
            heard = f"heard {now - r.heard:.1f} s ago" if r.heard else "never heard"
            waiting = beat.waiting or "in no exchange"
            lines.append(
                f"  {self.name(rank)}: step {beat.step}, {beat.n_exchanges} exchanges, {waiting}, "
                f"{heard}, pid {r.pid}"
            )
        with (self.state / "flight.log").open("a", encoding="utf-8") as f:
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
        self.ranks, self._parts, self._sent, self._failures = {}, {}, {}, []
        for request_id in self.scheduler.abandon():
            if request_id in self._queues:
                error = RequestError(f"the model stopped: {reason}", status=500)
                self._queues[request_id].put_nowait(error)
