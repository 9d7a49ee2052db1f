"""The end of a front: it answers what it has, and says so to who comes late."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from types import FrameType

import uvicorn

from v4_ascend.runtime.dispatcher import Dispatcher


class DrainingServer(uvicorn.Server):
    """Listens while it drains, so that a client is told so; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, patience_s: float) -> None:
        super().__init__(config)
        self._dispatcher, self._patience_s = dispatcher, patience_s
        self._deadline = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        if self._deadline < float("inf"):
            super().handle_exit(sig, frame)
        self._deadline = time.monotonic() + self._patience_s
        self._dispatcher.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end once everybody has an answer, or the time is up."""
        if self._deadline < float("inf"):
            if time.monotonic() > self._deadline:
                self._dispatcher.stop(f"stopped; {self._patience_s:g} s for the rest are over")
            self.should_exit |= self._dispatcher.is_idle
        return await super().on_tick(counter)


async def follow_parent() -> None:
    """End when the supervisor is gone: nothing may be left running."""
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
