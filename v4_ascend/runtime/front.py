"""The HTTP front: the APIs over the dispatcher. A process of its own."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvicorn

from v4_ascend.runtime.api.app import make_app
from v4_ascend.runtime.api.punctual import MAX_HEADER_BYTES, PunctualProtocol
from v4_ascend.runtime.api.service import Service
from v4_ascend.runtime.draining import DrainingServer


def main() -> None:
    """Serve until told to stop, then let running requests finish."""
    state, patience_s = Path(sys.argv[1]), float(sys.argv[2])

    async def serve() -> None:
        service = Service(state)
        config = uvicorn.Config(
            make_app(service),
            host=service.plan.host,
            port=service.plan.port,
            log_level="warning",
            http=PunctualProtocol,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=1,  # streams that are left after draining
        )
        await DrainingServer(config, service.dispatcher, patience_s).serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
