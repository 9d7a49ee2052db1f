"""HTTP connections that must come to the point: headers in time, and no more than fit."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
MAX_HEADER_BYTES = 64 << 10


class PunctualProtocol(H11Protocol):
    """Closes a connection on which no whole request header comes within `HEADER_SECONDS`.

    uvicorn itself ends idle connections behind a request, not those that never send one, or send
    it a byte a minute: each would hold a file descriptor for as long as its client likes.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a header."""
        super().connection_made(transport)
        self._time_header()

    def data_received(self, data: bytes) -> None:
        """Read on; a whole header ends the wait, the beginning of the next starts another."""
        super().data_received(data)
        self._time_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._cancel()

    def _time_header(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
