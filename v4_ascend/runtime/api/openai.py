"""``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from v4_ascend.chat import ToolCallDelta
from v4_ascend.errors import RequestError
from v4_ascend.runtime.api.answering import sse, unless_gone
from v4_ascend.runtime.api.ask import EFFORTS, Ask
from v4_ascend.runtime.api.controls import parse_body
from v4_ascend.runtime.api.errors import openai_error
from v4_ascend.runtime.api.gate import Gate
from v4_ascend.runtime.api.openai_answers import (
    Envelope,
    WholeChoice,
    completion_logprobs,
    delta_json,
    finish_reason,
    token_logprobs,
)
from v4_ascend.runtime.api.openai_bodies import IGNORED, ChatBody, CompletionBody, require_neutral
from v4_ascend.runtime.api.service import Service
from v4_ascend.runtime.api.usage import Usage
from v4_ascend.runtime.choice import Event, Wanted


def router(service: Service, gate: Gate) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        gate.require_key(request)
        length = service.plan.max_model_len
        model = {"id": service.plan.model_name, "object": "model", "owned_by": "v4-ascend"}
        return {"object": "list", "data": [model | {"created": 0, "max_model_len": length}]}

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response | dict[str, Any]:
        raw = require_neutral(await gate.read(request))
        body = parse_body(ChatBody, raw, IGNORED)
        service.require_model(body.model)
        body.require_stops("stop")
        return await _respond(request, service, await service.chat(chat_ask(body)), body)

    @routes.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response | dict[str, Any]:
        raw = require_neutral(await gate.read(request))
        body = parse_body(CompletionBody, raw, IGNORED)
        service.require_model(body.model)
        body.require_stops("stop")
        wanted = await service.completion(
            body.prompt, body, body.max_tokens, body.answer(), body.logprobs
        )
        return await _respond(request, service, wanted, body)

    return routes


def chat_ask(body: ChatBody) -> Ask:
    """Read a chat completion's body."""
    named = body.named_tool
    kwargs = body.chat_template_kwargs
    is_asked = bool(kwargs.get("thinking", kwargs.get("enable_thinking", False)))
    return Ask(
        messages=body.messages,
        controls=body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        tools=body.tools or [],
        tool_choice=body.tool_choice if isinstance(body.tool_choice, str) else "required",
        named_tool=named,
        are_calls_parallel=body.parallel_tool_calls,
        thinking=is_asked or body.reasoning_effort != "none",
        effort=EFFORTS.get(body.reasoning_effort),
        answer=body.answer(),
        n_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


async def _respond(
    request: Request, service: Service, wanted: Wanted, body: ChatBody | CompletionBody
) -> Response | dict[str, Any]:
    service.dispatcher.require_room(body.n)
    envelope = Envelope(body.model, wanted.is_chat, service.fingerprint, Usage.of(wanted, body.n))
    request.state.usage = envelope.usage
    if not body.stream:
        return await unless_gone(request, _whole(service, wanted, body.n, envelope))
    chunks = _stream(service, wanted, body.n, envelope, include_usage=body.includes_usage)
    return StreamingResponse(chunks, media_type="text/event-stream")


async def _whole(service: Service, wanted: Wanted, n: int, envelope: Envelope) -> dict[str, Any]:
    choices = [WholeChoice() for _ in range(n)]
    async for event in service.events(wanted, n):
        choices[event.choice].add(event)
        envelope.usage.count(event)
    out = []
    for index, choice in enumerate(choices):
        logprobs: dict[str, Any] | None = None
        if wanted.sampling.n_logprobs is not None and wanted.is_chat:
            content = [token_logprobs(s, service.tokenizer) for s in choice.sampled]
            logprobs = {"content": content, "refusal": None}
        elif wanted.sampling.n_logprobs is not None:
            logprobs = completion_logprobs(choice.sampled, service.tokenizer)
        make = choice.chat_json if wanted.is_chat else choice.text_json
        out.append(make(index, logprobs))
    return envelope.wrap(out, chunk=False) | {"usage": envelope.usage_json()}


async def _stream(
    service: Service, wanted: Wanted, n: int, envelope: Envelope, *, include_usage: bool
) -> AsyncIterator[str]:
    """Yield a response as server-sent events; an error late in it is an event too."""
    called: set[int] = set()
    try:
        if wanted.is_chat:
            for index in range(n):
                first = {"role": "assistant", "content": ""}
                yield sse(envelope.wrap([_chunk(index, first)], chunk=True))
        async for event in service.events(wanted, n):
            envelope.usage.count(event)
            for choice in _chunks(service, event, wanted, called):
                yield sse(envelope.wrap([choice], chunk=True))
        if include_usage:
            yield sse(envelope.wrap([], chunk=True) | {"usage": envelope.usage_json()})
        yield "data: [DONE]\n\n"
    except RequestError as e:
        yield sse(openai_error(e))


def _chunks(
    service: Service, event: Event, wanted: Wanted, called: set[int]
) -> list[dict[str, Any]]:
    if any(isinstance(d, ToolCallDelta) for d in event.deltas):
        called.add(event.choice)
    finish = finish_reason(event.finish, event.choice in called)
    has_logprobs = wanted.sampling.n_logprobs is not None
    if not wanted.is_chat:
        text = "".join(getattr(d, "text", "") for d in event.deltas)
        logprobs = completion_logprobs([event.sampled], service.tokenizer) if has_logprobs else None
        chunk = {"index": event.choice, "text": text, "logprobs": logprobs}
        return [chunk | {"finish_reason": finish}] if text or finish or logprobs else []
    chunks = [_chunk(event.choice, delta_json(d)) for d in event.deltas]
    if has_logprobs:
        chunks = chunks or [_chunk(event.choice, {})]
        entry = token_logprobs(event.sampled, service.tokenizer)
        chunks[0]["logprobs"] = {"content": [entry], "refusal": None}
    if finish:
        chunks.append(_chunk(event.choice, {}) | {"finish_reason": finish})
    return chunks


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
