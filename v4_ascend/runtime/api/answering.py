"""How answers leave: whole unless the client has left, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response

CLIENT_LEFT = 499  # nobody reads it; the log does


def sse(value: dict[str, Any], event: str | None = None) -> str:
    """Return a server-sent event."""
    name = f"event: {event}\n" if event is not None else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def unless_gone(
    request: Request, work: Coroutine[Any, Any, dict[str, Any]]
) -> Response | dict[str, Any]:
    """Do the work, or drop it once the client has left: its slot is another's."""
    answer, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=CLIENT_LEFT)
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
