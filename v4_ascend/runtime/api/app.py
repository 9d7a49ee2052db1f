"""The application: all APIs over one service, and what is said of its health."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from v4_ascend import __version__
from v4_ascend.errors import RequestError
from v4_ascend.runtime.api import anthropic, openai, page, responses, tokens
from v4_ascend.runtime.api.document import document
from v4_ascend.runtime.api.errors import anthropic_error, openai_error
from v4_ascend.runtime.api.gate import Gate
from v4_ascend.runtime.api.request_ids import RequestIds
from v4_ascend.runtime.api.service import Service


class Application:
    """The application as the plan has it now."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._app = make_app(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what comes; what has begun ends where it began."""
        await self._app(scope, receive, send)

    def read_plan_again(self) -> None:
        """Go on with what a changed plan says of keys, limits and origins."""
        self._service.read_plan_again()
        self._app = make_app(self._service)


def make_app(service: Service) -> FastAPI:
    """Build the application; its lifespan runs the dispatcher."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.dispatcher.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        service.dispatcher.link.close()

    # Without FastAPI's pages of documentation: they load scripts from a host of others.
    app = FastAPI(
        title="v4-ascend", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    gate = Gate(service.plan)
    for api in (openai, responses, anthropic, tokens):
        app.include_router(api.router(service, gate))
    app.include_router(page.router())
    if service.plan.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.plan.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(RequestIds)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, e: RequestError) -> JSONResponse:
        headers = {"Retry-After": str(e.retry_after)} if e.retry_after is not None else None
        if e.status == 408:  # what the request itself asked for; clients would try again
            headers = {"X-Should-Retry": "false"}
        is_anthropic = request.url.path.startswith(anthropic.PREFIX)
        body = anthropic_error(e, request.state.request_id) if is_anthropic else openai_error(e)
        return JSONResponse(body, status_code=e.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, e: HTTPException) -> JSONResponse:
        return await refuse(request, RequestError(str(e.detail), status=e.status_code))

    @app.exception_handler(Exception)
    async def broken(request: Request, e: Exception) -> JSONResponse:
        # The log has the traceback; to the client it is our fault and no more.
        return await refuse(request, RequestError(f"internal: {type(e).__name__}", status=500))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        h = service.dispatcher.health
        queue = {
            "waiting": service.dispatcher.scheduler.n_waiting,
            "running": service.dispatcher.scheduler.n_running,
        }
        said = h.__dict__ | queue | {"plan": service.digest}
        return JSONResponse(said, status_code=200 if h.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/ranks")
    async def ranks() -> list[dict[str, object]]:
        return service.dispatcher.watch.rows()

    @app.get("/experts")
    async def experts() -> dict[str, object]:
        return {"version": 1, "counts": service.dispatcher.expert_load()}

    described = document(app)
    app.openapi = lambda: described  # type: ignore[method-assign]
    return app
