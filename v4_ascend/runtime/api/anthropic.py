"""``/v1/messages``: Anthropic's API, whole or streamed, and its token count."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from v4_ascend.errors import RequestError
from v4_ascend.runtime.api.answering import sse, unless_gone
from v4_ascend.runtime.api.anthropic_bodies import (
    IGNORED,
    CountBody,
    MessagesBody,
    conversation,
    messages_ask,
)
from v4_ascend.runtime.api.blocks import Block, Blocks, Change
from v4_ascend.runtime.api.controls import parse_body
from v4_ascend.runtime.api.errors import anthropic_error
from v4_ascend.runtime.api.gate import Gate
from v4_ascend.runtime.api.service import Service
from v4_ascend.runtime.api.usage import Usage
from v4_ascend.runtime.choice import Event, Wanted

PREFIX = "/v1/messages"


def router(service: Service, gate: Gate) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post(PREFIX, response_model=None)
    async def messages(request: Request) -> Response | dict[str, Any]:
        body = parse_body(MessagesBody, await gate.read(request), IGNORED)
        service.require_model(body.model)
        wanted = await service.chat(messages_ask(body))
        service.dispatcher.require_room(1)
        answer = _Answer(body.model, Usage.of(wanted))
        request.state.usage = answer.usage
        if not body.stream:
            return await unless_gone(request, _whole(service, wanted, answer))
        chunks = _stream(service, wanted, answer, request.state.request_id)
        return StreamingResponse(chunks, media_type="text/event-stream")

    @routes.post(f"{PREFIX}/count_tokens")
    async def count_tokens(request: Request) -> dict[str, int]:
        body = parse_body(CountBody, await gate.read(request), IGNORED)
        service.require_model(body.model)
        return {"input_tokens": len(service.prompt_ids(conversation(body)))}

    return routes


async def _whole(service: Service, wanted: Wanted, answer: _Answer) -> dict[str, Any]:
    async for event in service.events(wanted):
        for _ in answer.take(event):
            pass
    return answer.json()


async def _stream(
    service: Service, wanted: Wanted, answer: _Answer, request_id: str
) -> AsyncIterator[str]:
    yield _event("message_start", message=answer.json())
    try:
        async for event in service.events(wanted):
            for change in answer.take(event):
                for kind, fields in _events_of(change):
                    yield _event(kind, **fields)
        for change in answer.blocks.close():
            for kind, fields in _events_of(change):
                yield _event(kind, **fields)
        end = {"stop_reason": answer.stop_reason, "stop_sequence": answer.stop_sequence}
        yield _event("message_delta", delta=end, usage=answer.usage_json())
        yield _event("message_stop")
    except RequestError as e:
        yield sse(anthropic_error(e, request_id), "error")


@dataclass
class _Answer:
    model: str
    usage: Usage
    blocks: Blocks = field(default_factory=Blocks)
    finish: str | None = None
    stop_sequence: str | None = None
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")

    def take(self, event: Event) -> list[Change]:
        self.usage.count(event)
        self.finish, self.stop_sequence = event.finish, event.stop
        return list(self.blocks.feed(event.deltas))

    @property
    def stop_reason(self) -> str | None:
        if self.finish == "length":
            return "max_tokens"
        if self.finish is None:
            return None
        if self.stop_sequence is not None:
            return "stop_sequence"
        return "tool_use" if self.blocks.has_calls else "end_turn"

    def usage_json(self) -> dict[str, int]:
        return {
            "input_tokens": self.usage.n_prompt,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": self.usage.n_completion,
        }

    def json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [_content(block) for block in self.blocks.all],
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self.usage_json(),
        }


def _content(block: Block) -> dict[str, Any]:
    match block.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": _signature(block)}
        case "text":
            return {"type": "text", "text": block.text}
        case "call":
            return _tool_use(block) | {"input": _input(block.text)}


def _tool_use(block: Block) -> dict[str, Any]:
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}


def _input(arguments: str) -> Any:
    """Read a call's arguments; of one cut off there is no object."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _signature(block: Block) -> str:
    """Return what clients expect beside thinking; nothing is checked when it comes back."""
    return hashlib.sha256(block.text.encode()).hexdigest()


def _events_of(change: Change) -> list[tuple[str, dict[str, Any]]]:
    block, at = change.block, {"index": change.block.index}
    empty = {
        "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
        "text": {"type": "text", "text": ""},
        "call": _tool_use(block),
    }[block.kind]
    more = {
        "reasoning": {"type": "thinking_delta", "thinking": change.text},
        "text": {"type": "text_delta", "text": change.text},
        "call": {"type": "input_json_delta", "partial_json": change.text},
    }[block.kind]
    if change.what == "open":
        return [("content_block_start", at | {"content_block": empty})]
    if change.what == "more":
        return [("content_block_delta", at | {"delta": more})]
    end: list[tuple[str, dict[str, Any]]] = [("content_block_stop", at)]
    if block.kind == "reasoning":
        signed = {"type": "signature_delta", "signature": _signature(block)}
        end.insert(0, ("content_block_delta", at | {"delta": signed}))
    return end


def _event(kind: str, **fields: Any) -> str:
    return sse({"type": kind, **fields}, kind)
