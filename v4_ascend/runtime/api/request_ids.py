"""Every request has an id: the caller's, or a new one. Answer and log line carry it."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v4_ascend.runtime.api.log import log_json
from v4_ascend.runtime.api.usage import Usage

_GOOD = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET = {"/health", "/ready", "/metrics", "/ranks"}  # asked all the time, by machines


class RequestIds:
    """Sets ``request.state.request_id`` and the header, and logs the request's end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GOOD.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = headers["Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            if scope["path"] not in _QUIET:
                usage: Usage | None = scope["state"].get("usage")
                log_json(
                    "request",
                    request_id=request_id,
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=round(time.monotonic() - start, 4),
                    prompt_tokens=usage.n_prompt if usage is not None else None,
                    completion_tokens=usage.n_completion if usage is not None else None,
                )
