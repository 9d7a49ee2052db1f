"""Errors as each API writes them."""

from __future__ import annotations

from typing import Any

from v4_ascend.errors import RequestError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
_ANTHROPIC_TYPES = _TYPES | {413: "request_too_large", 503: "overloaded_error"}


def openai_error(e: RequestError) -> dict[str, Any]:
    """Return OpenAI's body."""
    kind = _TYPES.get(e.status, "server_error" if e.status >= 500 else "invalid_request_error")
    code = _OPENAI_CODES.get(e.status)
    return {"error": {"message": str(e), "type": kind, "param": e.param, "code": code}}


def anthropic_error(e: RequestError, request_id: str) -> dict[str, Any]:
    """Return Anthropic's body; it is an event of a stream too."""
    other = "api_error" if e.status >= 500 else "invalid_request_error"
    error = {"type": _ANTHROPIC_TYPES.get(e.status, other), "message": str(e)}
    return {"type": "error", "error": error, "request_id": request_id}
