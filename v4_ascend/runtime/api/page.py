"""The page at ``/``: a chat, and how the deployment is. One file, which loads nothing else."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


def router() -> APIRouter:
    """Return its route. The page has no secrets: who asks for more needs a key."""
    routes = APIRouter()
    html = (files("v4_ascend.runtime.api") / "page.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return routes


def policy(html: str) -> str:
    """Return the Content-Security-Policy under which only this very style and script run.

    Whatever a model says, or a page in between adds, is not among them; and requests go to the
    server the page came from.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src {_digest(html, 'style')}",
            f"script-src {_digest(html, 'script')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _digest(html: str, tag: str) -> str:
    (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
