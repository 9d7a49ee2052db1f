"""``/v1/responses``: OpenAI's newer API, without a memory: every request brings its whole input."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from v4_ascend.errors import RequestError
from v4_ascend.runtime.api.answering import sse, unless_gone
from v4_ascend.runtime.api.blocks import Block, Blocks, Change
from v4_ascend.runtime.api.controls import parse_body
from v4_ascend.runtime.api.errors import openai_error
from v4_ascend.runtime.api.gate import Gate
from v4_ascend.runtime.api.responses_bodies import IGNORED, ResponsesBody, responses_ask
from v4_ascend.runtime.api.service import Service
from v4_ascend.runtime.api.usage import Usage
from v4_ascend.runtime.choice import Wanted


def router(service: Service, gate: Gate) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None)
    async def responses(request: Request) -> Response | dict[str, Any]:
        raw = await gate.read(request)
        body = parse_body(ResponsesBody, raw, IGNORED)
        service.require_model(body.model)
        wanted = await service.chat(responses_ask(body))
        service.dispatcher.require_room(1)
        answer = _Answer(body, raw, Usage.of(wanted))
        request.state.usage = answer.usage
        if not body.stream:
            return await unless_gone(request, _whole(service, wanted, answer))
        return StreamingResponse(_stream(service, wanted, answer), media_type="text/event-stream")

    return routes


async def _whole(service: Service, wanted: Wanted, answer: _Answer) -> dict[str, Any]:
    async for event in service.events(wanted):
        answer.usage.count(event)
        answer.finish = event.finish
        for _ in answer.blocks.feed(event.deltas):
            pass
    return answer.json()


async def _stream(service: Service, wanted: Wanted, answer: _Answer) -> AsyncIterator[str]:
    number = 0

    def event(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number - 1, **fields}, kind)

    yield event("response.created", response=answer.json())
    yield event("response.in_progress", response=answer.json())
    try:
        async for drawn in service.events(wanted):
            answer.usage.count(drawn)
            for change in answer.blocks.feed(drawn.deltas):
                for kind, fields in answer.events_of(change):
                    yield event(kind, **fields)
            answer.finish = drawn.finish
        for change in answer.blocks.close():
            for kind, fields in answer.events_of(change):
                yield event(kind, **fields)
        yield event(f"response.{answer.status}", response=answer.json())
    except RequestError as e:
        answer.error = e
        yield event("response.failed", response=answer.json())


@dataclass
class _Answer:
    body: ResponsesBody
    raw: Mapping[str, Any]
    usage: Usage
    blocks: Blocks = field(default_factory=Blocks)
    finish: str | None = None
    error: RequestError | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def status(self) -> str:
        if self.error is not None:
            return "failed"
        if self.finish is None:
            return "in_progress"
        return "incomplete" if self.finish == "length" else "completed"

    def json(self) -> dict[str, Any]:
        u, echo = self.usage, self.raw.get
        is_done = self.status in ("completed", "incomplete")
        usage = {
            "input_tokens": u.n_prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": u.n_completion,
            "output_tokens_details": {"reasoning_tokens": u.n_reasoning},
            "total_tokens": u.n_prompt + u.n_completion,
        }
        reason = "max_output_tokens" if self.status == "incomplete" else None
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "error": self._error_json(),
            "incomplete_details": {"reason": reason} if reason else None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "model": self.body.model,
            "output": [self.item(block) for block in self.blocks.all],
            "parallel_tool_calls": self.body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": echo("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "temperature": self.body.temperature,
            "text": echo("text") or {"format": {"type": "text"}},
            "tool_choice": self.body.tool_choice,
            "tools": self.body.tools,
            "top_p": self.body.top_p,
            "truncation": "disabled",
            "usage": usage if is_done else None,
            "metadata": echo("metadata") or {},
        }

    def _error_json(self) -> dict[str, str] | None:
        if self.error is None:
            return None
        kind = openai_error(self.error)["error"]["type"]
        return {"code": kind, "message": str(self.error)}

    def item(self, block: Block) -> dict[str, Any]:
        """Return a block as an output item."""
        is_open = self.finish is None and block is self.blocks.all[-1]
        is_cut = self.finish == "length" and block is self.blocks.all[-1]
        status = "in_progress" if is_open else "incomplete" if is_cut else "completed"
        prefix = {"reasoning": "rs", "text": "msg", "call": "fc"}[block.kind]
        item = {"id": f"{prefix}_{self.id}_{block.index}", "status": status}
        match block.kind:
            case "reasoning":
                return item | {"type": "reasoning", "summary": [], "content": [_part(block)]}
            case "text":
                return item | {"type": "message", "role": "assistant", "content": [_part(block)]}
            case "call":
                call = {"call_id": block.id, "name": block.name, "arguments": block.text}
                return item | {"type": "function_call", **call}

    def events_of(self, change: Change) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return the events that tell of a change."""
        block, item = change.block, self.item(change.block)
        at = {"item_id": item["id"], "output_index": block.index}
        in_part = at | {"content_index": 0}
        text = {"reasoning": "reasoning_text", "text": "output_text"}.get(block.kind)
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        match change.what:
            case "open":
                without: dict[str, Any] = {"arguments": ""} if text is None else {"content": []}
                empty = item | without
                yield "response.output_item.added", {"output_index": block.index, "item": empty}
                if text is not None:
                    part = _part(block) | {"text": ""}
                    yield "response.content_part.added", in_part | {"part": part}
            case "more" if text is None:
                yield "response.function_call_arguments.delta", at | {"delta": change.text}
            case "more":
                yield f"response.{text}.delta", in_part | {"delta": change.text} | logprobs
            case "close":
                item["status"] = "incomplete" if self.finish == "length" else "completed"
                if text is None:
                    whole = {"arguments": block.text, "name": block.name}
                    yield "response.function_call_arguments.done", at | whole
                else:
                    yield f"response.{text}.done", in_part | {"text": block.text} | logprobs
                    yield "response.content_part.done", in_part | {"part": _part(block)}
                yield "response.output_item.done", {"output_index": block.index, "item": item}


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
