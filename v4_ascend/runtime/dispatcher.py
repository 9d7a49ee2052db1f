"""The loop between requests and the rank: one step in flight, tokens to their requests."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from v4_ascend.errors import RequestError
from v4_ascend.runtime.link import FrontLink, is_alive
from v4_ascend.runtime.messages import Failed, Hello, Loading, Ready, Sampling, StepResult
from v4_ascend.runtime.scheduler import Request, Scheduler, Token

WATCH_SECONDS = 0.5


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
class Dispatcher:
    """Owns the scheduler and the link; everything runs on one event loop."""

    scheduler: Scheduler
    state: Path
    health: Health = field(default_factory=Health)

    def __post_init__(self) -> None:
        self.link = FrontLink(self.state)
        self._ids = itertools.count()
        self._queues: dict[int, asyncio.Queue[Token | RequestError]] = {}
        self._work = asyncio.Event()
        self._rank_pid: int | None = None

    def drain(self) -> None:
        """From now on answer new requests with 503; those that are here go on."""
        self.health.is_ready, self.health.state = False, "draining"

    @property
    def is_idle(self) -> bool:
        """Whether every request has its answer."""
        return not self._queues

    async def run(self) -> None:
        """Bring the rank up, then run steps until cancelled.

        A failure in here is a failure of the deployment, and `/ready` says so.
        """
        steps = asyncio.create_task(self._steps())
        steps.add_done_callback(self._ended)
        try:
            await asyncio.gather(self._watch(), steps)
        finally:
            steps.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(f"{type(error).__name__}: {error}")

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
        """Notice a rank that ended without a word."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._rank_pid is not None and not is_alive(self._rank_pid):
                self._lose(f"rank 0 (pid {self._rank_pid}) ended")

    async def _steps(self) -> None:
        await self._come_up()
        while True:
            await self._work.wait()
            step = self.scheduler.next_step()
            if step is None:
                self._work.clear()
                continue
            await self.link.send(step)
            message = await self.link.receive()
            if isinstance(message, StepResult):
                for token in self.scheduler.apply(message):
                    if token.request in self._queues:
                        self._queues[token.request].put_nowait(token)
            elif isinstance(message, Failed):
                self._lose(message.reason)

    async def _come_up(self) -> None:
        while self._rank_pid is None:  # whoever does not know the secret is not listened to
            match await self.link.receive():
                case Hello(secret, pid) if secret == self.link.address.secret:
                    self._rank_pid, self.health.state = pid, "loading"
        while True:
            match await self.link.receive():
                case Loading(done, total):
                    self.health.loaded_bytes, self.health.total_bytes = done, total
                    self.health.state = "canary" if done == total else "loading"
                case Ready(canary, _):
                    self.health.canary, self.health.state = canary, "ready"
                    self.health.is_ready = True
                    return
                case Failed(reason):
                    self._lose(reason)

    def _lose(self, reason: str) -> None:
        """Answer every request with the reason; the front itself stays up."""
        if self.health.state == "failed":
            return
        self.health.is_ready, self.health.state = False, "failed"
        self.health.reason = reason
        for request_id in self.scheduler.abandon():
            if request_id in self._queues:
                error = RequestError(f"the model stopped: {reason}", status=500)
                self._queues[request_id].put_nowait(error)
