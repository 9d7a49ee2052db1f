"""The HTTP front: the OpenAI API over the dispatcher. A process of its own."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from v4_ascend import __version__
from v4_ascend.chat import ChatTokenizer, ToolCallDelta, encode_messages, encoder_release
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import RequestError
from v4_ascend.runtime.choice import Event, Wanted, run_choice
from v4_ascend.runtime.dispatcher import Dispatcher
from v4_ascend.runtime.draining import DrainingServer, follow_parent
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.load import resolve_checkpoint
from v4_ascend.runtime.messages import Rules, Sampling
from v4_ascend.runtime.openai_schema import ChatBody, CompletionBody, parse_body
from v4_ascend.runtime.responses import (
    Envelope,
    WholeChoice,
    completion_logprobs,
    delta_json,
    finish_reason,
    token_logprobs,
)
from v4_ascend.runtime.scheduler import Scheduler
from v4_ascend.supernode.plan import Plan

CLIENT_LEFT = 499  # nobody reads it; the access log does
RETRY_AFTER = {"Retry-After": "1"}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


class Front:
    """Turns requests into prompts, and tokens into responses."""

    def __init__(self, state: Path) -> None:
        self.plan = Plan.read(state / "plan.json")
        folder = resolve_checkpoint(self.plan.checkpoint)
        self.config = ModelConfig.read(folder)
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.release = encoder_release(raw)
        self.tokenizer = ChatTokenizer.load(folder)
        self.defaults = _generation_defaults(folder)
        scheduler = Scheduler(
            limits_of(self.plan, self.config),
            eos_id=self.config.eos_token_id,
            n_groups=self.plan.parallel.dp_size,
            n_in_flight=self.plan.parallel.pp_size,
        )
        self.dispatcher = Dispatcher(scheduler, state, self.plan)

    def chat(self, body: ChatBody) -> Wanted:
        """Encode a conversation."""
        if body.tool_choice not in (None, "auto", "none"):
            message = f"tool_choice: {body.tool_choice!r} is not supported yet; 'auto' or 'none'"
            raise RequestError(message, param="tool_choice")
        if body.messages[-1].get("role") not in ("user", "tool"):
            raise RequestError("messages: the last one must be of user or tool", param="messages")
        if any(m.get("role") == "developer" for m in body.messages):
            raise RequestError("messages: role developer is internal; use system", param="messages")
        asked = body.chat_template_kwargs.get("thinking", False)
        thinking = bool(asked) or body.reasoning_effort not in (None, "none")
        effort = {"minimal": "low", "medium": "low"}.get(
            body.reasoning_effort or "none", body.reasoning_effort
        )
        tools = body.tools if body.tool_choice != "none" else None
        prompt = encode_messages(
            body.messages,
            thinking=thinking,
            reasoning_effort=effort if thinking and effort != "none" else None,  # type: ignore[arg-type]
            tools=tools,
            release=self.release,
        )
        n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        limit = body.max_completion_tokens or body.max_tokens
        return Wanted(
            **self._limits(body, self.tokenizer.encode_prompt(prompt), limit, "messages"),
            sampling=self._sampling(body, n_logprobs),
            stops=body.stops,
            thinking=thinking,
            tools=bool(tools),
            is_chat=True,
        )

    def completion(self, body: CompletionBody) -> Wanted:
        """Take a prompt as it is."""
        if isinstance(body.prompt, str):
            ids = [self.config.bos_token_id, *self.tokenizer.encode_plain(body.prompt)]
        else:
            ids = body.prompt
        if not ids or min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise RequestError(
                f"prompt: token ids must be 0..{self.config.vocab_size - 1}", param="prompt"
            )
        return Wanted(
            **self._limits(body, ids, body.max_tokens, "prompt"),
            sampling=self._sampling(body, body.logprobs),
            stops=body.stops,
            thinking=False,
            tools=False,
            is_chat=False,
        )

    def _limits(
        self, body: ChatBody | CompletionBody, prompt_ids: list[int], asked: int | None, param: str
    ) -> dict[str, Any]:
        room = self.plan.max_model_len - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, max_model_len is "
                f"{self.plan.max_model_len} and must leave room for an answer",
                param=param,
            )
        max_tokens = min(asked or room, room)
        rules = self._rules(body, prompt_ids, max_tokens)
        return {"prompt_ids": prompt_ids, "max_tokens": max_tokens, "rules": rules}

    def _rules(
        self, body: ChatBody | CompletionBody, prompt_ids: list[int], max_tokens: int
    ) -> Rules | None:
        for token in body.logit_bias:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    f"logit_bias: token {token} is not in 0..{self.config.vocab_size - 1}",
                    param="logit_bias",
                )
        if body.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens: {body.min_tokens} is more than may be drawn, {max_tokens}",
                param="min_tokens",
            )
        rules = Rules(
            n_before=len(prompt_ids),
            before=prompt_ids if body.repetition_penalty != 1 else [],
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=body.logit_bias,
            min_tokens=max_tokens if body.ignore_eos else body.min_tokens,
        )
        return rules if rules != Rules(n_before=len(prompt_ids)) else None

    def _sampling(self, body: ChatBody | CompletionBody, n_logprobs: int | None) -> Sampling:
        temperature, top_p = self.defaults
        return Sampling(
            temperature if body.temperature is None else body.temperature,
            top_p if body.top_p is None else body.top_p,
            secrets.randbits(63) if body.seed is None else body.seed,
            n_logprobs,
            max(body.top_k, 0),
            body.min_p,
        )

    def require_model(self, name: str) -> None:
        """Refuse another model's name."""
        if name != self.plan.model_name:
            raise RequestError(
                f"model {name!r} is not served here; {self.plan.model_name!r} is",
                param="model",
                status=404,
            )

    async def events(self, wanted: Wanted, n: int) -> AsyncIterator[Event]:
        """Run all choices at once and yield their events as they come."""
        queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

        async def pump(choice: int) -> None:
            async for event in run_choice(self.dispatcher, self.tokenizer, wanted, choice):
                queue.put_nowait(event)

        def ended(task: asyncio.Task[None]) -> None:
            # Every end is told, a failure of ours too: nobody may wait for a dead task.
            queue.put_nowait(None if task.cancelled() else task.exception())

        tasks = [asyncio.create_task(pump(i)) for i in range(n)]
        for task in tasks:
            task.add_done_callback(ended)
        try:
            left = n
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def whole(self, wanted: Wanted, n: int, envelope: Envelope) -> dict[str, Any]:
        """Collect a response that is not streamed."""
        choices = [WholeChoice() for _ in range(n)]
        async for event in self.events(wanted, n):
            choices[event.choice].add(event)
            envelope.n_completion += 1
        has_logprobs = wanted.sampling.n_logprobs is not None
        out = []
        for index, choice in enumerate(choices):
            logprobs: dict[str, Any] | None = None
            if has_logprobs and wanted.is_chat:
                content = [token_logprobs(s, self.tokenizer) for s in choice.sampled]
                logprobs = {"content": content, "refusal": None}
            elif has_logprobs:
                logprobs = completion_logprobs(choice.sampled, self.tokenizer)
            make = choice.chat_json if wanted.is_chat else choice.text_json
            out.append(make(index, logprobs))
        return envelope.wrap(out, chunk=False) | {"usage": envelope.usage()}

    async def stream(
        self, wanted: Wanted, n: int, envelope: Envelope, *, include_usage: bool
    ) -> AsyncIterator[str]:
        """Yield a response as server-sent events; an error late in it is an event too."""
        called: set[int] = set()
        try:
            if wanted.is_chat:
                for index in range(n):
                    first = {"role": "assistant", "content": ""}
                    yield _sse(envelope.wrap([_chunk(index, first)], chunk=True))
            async for event in self.events(wanted, n):
                envelope.n_completion += 1
                for choice in self._chunks(event, wanted, called):
                    yield _sse(envelope.wrap([choice], chunk=True))
            if include_usage:
                yield _sse(envelope.wrap([], chunk=True) | {"usage": envelope.usage()})
            yield "data: [DONE]\n\n"
        except RequestError as e:
            yield _sse(_error_json(e))

    def _chunks(self, event: Event, wanted: Wanted, called: set[int]) -> list[dict[str, Any]]:
        if any(isinstance(d, ToolCallDelta) for d in event.deltas):
            called.add(event.choice)
        finish = finish_reason(event.finish, event.choice in called)
        if not wanted.is_chat:
            text = "".join(getattr(d, "text", "") for d in event.deltas)
            logprobs = (
                completion_logprobs([event.sampled], self.tokenizer)
                if wanted.sampling.n_logprobs is not None
                else None
            )
            chunk = {"index": event.choice, "text": text, "logprobs": logprobs}
            return [chunk | {"finish_reason": finish}] if text or finish or logprobs else []
        chunks = [_chunk(event.choice, delta_json(d)) for d in event.deltas]
        if wanted.sampling.n_logprobs is not None:
            chunks = chunks or [_chunk(event.choice, {})]
            entry = token_logprobs(event.sampled, self.tokenizer)
            chunks[0]["logprobs"] = {"content": [entry], "refusal": None}
        if finish:
            chunks.append(_chunk(event.choice, {}) | {"finish_reason": finish})
        return chunks


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _error_json(e: RequestError) -> dict[str, Any]:
    kind = TYPES.get(e.status, "server_error" if e.status >= 500 else "invalid_request_error")
    return {
        "error": {"message": str(e), "type": kind, "param": e.param, "code": CODES.get(e.status)}
    }


def _generation_defaults(folder: Path) -> tuple[float, float]:
    file = folder / "generation_config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return float(raw.get("temperature", 1.0)), float(raw.get("top_p", 1.0))


def make_app(front: Front) -> FastAPI:
    """Build the application; its lifespan runs the dispatcher."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(front.dispatcher.run()), asyncio.create_task(follow_parent())]
        yield
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
        front.dispatcher.link.close()

    app = FastAPI(title="v4-ascend", version=__version__, lifespan=lifespan)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, e: RequestError) -> JSONResponse:
        headers = RETRY_AFTER if e.status in (429, 503) else None
        return JSONResponse(_error_json(e), status_code=e.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, e: HTTPException) -> JSONResponse:
        return await refuse(request, RequestError(str(e.detail), status=e.status_code))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        h = front.dispatcher.health
        queue = {
            "waiting": front.dispatcher.scheduler.n_waiting,
            "running": front.dispatcher.scheduler.n_running,
        }
        return JSONResponse(h.__dict__ | queue, status_code=200 if h.is_ready else 503)

    @app.get("/ranks")
    async def ranks() -> list[dict[str, object]]:
        return front.dispatcher.watch.rows()

    @app.get("/experts")
    async def experts() -> dict[str, object]:
        return {"version": 1, "counts": front.dispatcher.expert_load()}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authenticate(request, front.plan.api_keys)
        length = front.plan.max_model_len
        model = {"id": front.plan.model_name, "object": "model", "owned_by": "v4-ascend"}
        return {"object": "list", "data": [model | {"created": 0, "max_model_len": length}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response | dict[str, Any]:
        body = parse_body(ChatBody, await _json(request, front))
        front.require_model(body.model)
        return await _respond(request, front, front.chat(body), body)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response | dict[str, Any]:
        body = parse_body(CompletionBody, await _json(request, front))
        front.require_model(body.model)
        return await _respond(request, front, front.completion(body), body)

    return app


async def _respond(
    request: Request, front: Front, wanted: Wanted, body: ChatBody | CompletionBody
) -> Response | dict[str, Any]:
    front.dispatcher.require_room(body.n)
    fingerprint = f"v4-ascend-{__version__}-{front.plan.digest[:8]}"
    envelope = Envelope(body.model, wanted.is_chat, fingerprint, len(wanted.prompt_ids))
    if not body.stream:
        return await _unless_gone(request, front.whole(wanted, body.n, envelope))
    usage = body.stream_options is not None and body.stream_options.include_usage
    chunks = front.stream(wanted, body.n, envelope, include_usage=usage)
    return StreamingResponse(chunks, media_type="text/event-stream")


async def _unless_gone(
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


async def _json(request: Request, front: Front) -> Any:
    _authenticate(request, front.plan.api_keys)
    try:
        return await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise RequestError(f"the body is not JSON: {e}") from e


def _authenticate(request: Request, keys: tuple[str, ...]) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    # A list: every key is compared, so the time says nothing about which one matched.
    is_known = [hmac.compare_digest(given, k.encode()) for k in keys]
    if keys and True not in is_known:
        raise RequestError("a valid API key is needed: Authorization: Bearer ...", status=401)


def main() -> None:
    """Serve until told to stop, then let running requests finish."""
    front = None
    state, patience_s = Path(sys.argv[1]), float(sys.argv[2])
    plan = Plan.read(state / "plan.json")

    async def serve() -> None:
        nonlocal front
        front = Front(state)
        config = uvicorn.Config(
            make_app(front),
            host=plan.host,
            port=plan.port,
            log_level="warning",
            timeout_graceful_shutdown=1,  # streams that are left after draining
        )
        await DrainingServer(config, front.dispatcher, patience_s).serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
