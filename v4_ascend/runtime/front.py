"""The HTTP front: the APIs over the dispatcher. A process of its own.

It is started with two sockets: its deployment's address, at which it listens once it is told to,
and one of its own, at which who started it asks how far it is.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from v4_ascend.runtime.api.app import Application
from v4_ascend.runtime.api.punctual import MAX_HEADER_BYTES, PunctualProtocol
from v4_ascend.runtime.api.service import Service
from v4_ascend.runtime.draining import DrainingServer
from v4_ascend.runtime.orders import ORDERS


def main() -> None:
    """Serve until told to stop, then let running requests finish."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)  # before anybody can know that we are here
    state = Path(sys.argv[1])
    parent = int(sys.argv[2])  # told, not asked for: it may be gone before we are here
    address, inside = (socket.socket(fileno=int(fd)) for fd in sys.argv[3:5])

    async def serve() -> None:
        service = Service(state)
        app = Application(service)
        config = uvicorn.Config(
            app,
            log_level="warning",
            http=PunctualProtocol,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=1,  # streams that are left after draining
        )
        server = DrainingServer(config, app, service.dispatcher, state, address, parent)
        await server.serve([inside])

    asyncio.run(serve())


if __name__ == "__main__":
    main()
