"""When a front listens, and its end: it answers what it has, and says so to who comes late."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from v4_ascend.runtime.api.punctual import PunctualProtocol
from v4_ascend.runtime.orders import GIVE_WAY, OPEN, ORDERS, PATIENCE, READ_PLAN

if TYPE_CHECKING:
    from v4_ascend.runtime.api.app import Application
    from v4_ascend.runtime.dispatcher import Dispatcher

CLOSE = (b"connection", b"close")


class DrainingServer(uvicorn.Server):
    """Listens while it drains, so that a client is told so; a second signal ends it at once.

    One that gives way does not: its clients are served to the end, and led to the other front by
    closing their connections behind an answer.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: Application,
        dispatcher: Dispatcher,
        state: Path,
        address: socket.socket,
        parent: int,
    ) -> None:
        super().__init__(config)
        self._app, self._dispatcher, self._state = app, dispatcher, state
        self._address, self._parent = address, parent
        self._listening: asyncio.Server | None = None
        self._patience_s, self._deadline = 0.0, float("inf")
        self._has_given_way = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        if self._deadline < float("inf"):
            super().handle_exit(sig, frame)
        self._set_deadline()
        self._dispatcher.drain()

    def _set_deadline(self) -> None:
        self._patience_s = float((self._state / PATIENCE).read_text(encoding="utf-8"))
        self._deadline = time.monotonic() + self._patience_s

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: follow orders; end once everybody has an answer, or the time is up.

        Without a parent there is nobody to end the ranks: nothing may be left running.
        """
        ends = await super().on_tick(counter)
        if (order := signal.sigtimedwait(ORDERS, 0)) is not None:
            await self._follow(order.si_signo)
        if os.getppid() != self._parent:
            self._give_way()
        if self._has_given_way and CLOSE not in self.server_state.default_headers:
            self.server_state.default_headers.append(CLOSE)
        if self._deadline < float("inf"):
            if is_late := time.monotonic() > self._deadline:
                self._dispatcher.stop(f"stopped; {self._patience_s:g} s for the rest are over")
            may_ask = self._has_given_way and self.server_state.connections and not is_late
            self.should_exit |= self._dispatcher.is_idle and not may_ask
        return ends or self.should_exit

    async def _follow(self, order: int) -> None:
        if order == OPEN and self._listening is None and not self._has_given_way:
            self._listening = await asyncio.get_running_loop().create_server(
                lambda: PunctualProtocol(
                    config=self.config,
                    server_state=self.server_state,
                    app_state=self.lifespan.state,
                ),
                sock=self._address,
                backlog=self.config.backlog,
            )
            self.servers.append(self._listening)
            self._dispatcher.health.is_open = True
        elif order == READ_PLAN:
            self._app.read_plan_again()
        elif order == GIVE_WAY:
            self._give_way()

    def _give_way(self) -> None:
        """Leave the address to whoever has it too; without such a one nobody is at it."""
        if self._has_given_way:
            return
        self._has_given_way = True
        if self._listening is not None:
            self._listening.close()
        self._address.close()
        self._dispatcher.give_way()
        self._set_deadline()
