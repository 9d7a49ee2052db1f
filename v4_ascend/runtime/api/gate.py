"""What a request passes before it is read: its key, its rate, its size."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
from typing import Any

from fastapi import Request

from v4_ascend.errors import RequestError
from v4_ascend.supernode.plan import Plan

BODY_SECONDS = 60.0  # of `max_body_bytes`, 32 MiB unless told otherwise, 0.5 MB a second


class RateLimit:
    """A bucket for each caller: `per_minute` requests at once, refilled evenly."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left: dict[str, tuple[float, float]] = {}  # caller -> requests left, when

    def take(self, caller: str, now: float) -> float:
        """Take one; return 0, or the seconds until there is one."""
        left, then = self._left.get(caller, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        if left < 1:
            self._left[caller] = left, now
            return (1 - left) * 60 / self.per_minute
        self._left[caller] = left - 1, now
        self._forget_full(now)
        return 0.0

    def _forget_full(self, now: float) -> None:
        """Callers not heard of for a minute have a full bucket again."""
        self._left = {c: v for c, v in self._left.items() if now - v[1] < 60}


class Gate:
    """Lets requests in, and reads their bodies."""

    def __init__(self, plan: Plan) -> None:
        self._keys = [k.encode() for k in plan.api_keys]
        self._max_bytes = plan.max_body_bytes
        limit = plan.requests_per_minute
        self._rate = RateLimit(limit) if limit is not None else None

    def require_key(self, request: Request) -> str:
        """Return who calls: the key, or without any the address.

        Raises:
            RequestError: no valid key (401).
        """
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = (request.headers.get("x-api-key") or bearer).encode()
        # A list: every key is compared, so the time says nothing about which one matched.
        is_known = [hmac.compare_digest(given, k) for k in self._keys]
        if not self._keys:
            return request.client.host if request.client is not None else ""
        if True not in is_known:
            message = "a valid API key is needed: Authorization: Bearer ... or X-Api-Key: ..."
            raise RequestError(message, status=401)
        return given.decode()

    async def read(self, request: Request) -> Any:
        """Return the JSON a caller sent.

        Raises:
            RequestError: no valid key (401), too often (429), too large (413), too slow (408),
                or not JSON.
        """
        caller = self.require_key(request)
        if self._rate is not None and (wait := self._rate.take(caller, time.monotonic())):
            raise RequestError(
                f"more requests than {self._rate.per_minute} a minute; again in {wait:.1f} s",
                status=429,
                retry_after=math.ceil(wait),
            )
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(request)
        except TimeoutError as e:
            message = f"the body was not here within {BODY_SECONDS:g} s"
            raise RequestError(message, status=408) from e
        try:
            value = json.loads(body, parse_float=_finite, parse_constant=_finite)
            if b"\\u" in body or b"\xed" in body:  # the only ways to write half a surrogate pair
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            found = f"U+{ord(str(e.object)[e.start]):04X}"
            raise RequestError(f"the body has {found}, half a surrogate pair: no text") from e
        except (ValueError, RecursionError) as e:
            raise RequestError(f"the body is not JSON: {e}") from e
        return value

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_bytes:
                raise RequestError(
                    f"the body has more than {self._max_bytes} bytes; serve.max_body_bytes",
                    status=413,
                )
        return bytes(body)


def _finite(text: str) -> float:
    """Read a number; JSON has no NaN and no infinity, and answers could not repeat them."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
