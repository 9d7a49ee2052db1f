"""An endpoint as a case sees it: requests, and what must hold of every answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

MARKUP = ("｜DSML｜", "<｜", "</think>")  # must never be in what a client is given


class CaseFailedError(Exception):
    """What a case found."""


class CaseSkippedError(Exception):
    """Why a case says nothing about this endpoint."""


@dataclass
class Said:
    """One choice, whole or put together from a stream."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=dict)


def require(is_so: object, problem: str) -> None:
    """Fail the case unless something holds."""
    if not is_so:
        raise CaseFailedError(problem)


class Endpoint:
    """Speaks to one model behind one URL."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self.client, self.model = client, model

    def body(self, text: str = "Say something short.", **more: Any) -> dict[str, Any]:
        """Return a small request at temperature 0."""
        messages = [{"role": "user", "content": text}]
        small = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 24}
        return small | more

    def refuse(self, status: int, path: str = "/chat/completions", **request: Any) -> str:
        """Require an error of OpenAI's form; return its message."""
        answer = self.client.post(path, **request)
        require(answer.status_code == status, f"status {answer.status_code}, must be {status}")
        error = answer.json().get("error")
        require(isinstance(error, dict), f"no error object: {answer.text[:80]!r}")
        for key in ("message", "type"):
            require(isinstance(error.get(key), str), f"error.{key} is not a string: {error}")
        return str(error["message"])

    def chat(self, **body: Any) -> Said:
        """Ask for one whole answer."""
        answer = self.client.post("/chat/completions", json=body)
        require(answer.status_code == 200, f"status {answer.status_code}: {answer.text[:200]}")
        whole = answer.json()
        require(whole.get("object") == "chat.completion", f"object is {whole.get('object')!r}")
        choice = whole["choices"][0]
        message = choice["message"]
        require(message.get("role") == "assistant", f"role is {message.get('role')!r}")
        return _checked(
            Said(
                message.get("content") or "",
                _reasoning(message),
                message.get("tool_calls") or [],
                choice["finish_reason"],
                whole.get("usage") or {},
                message,
            )
        )

    def stream(self, **body: Any) -> Said:
        """Ask for a streamed answer, and put it together as clients do."""
        said = Said()
        usage = {"stream_options": {"include_usage": True}}
        with self.events(**body, **usage) as events:
            for event in events:
                require("error" not in event, f"an error in the stream: {event.get('error')}")
                said.usage = event.get("usage") or said.usage
                for choice in event["choices"]:
                    require(not said.finish, "a chunk with a choice behind its finish_reason")
                    said.finish = choice.get("finish_reason")
                    _add(said, choice["delta"])
        require(said.finish, "the stream ended without a finish_reason")
        return _checked(said)

    @contextmanager
    def events(self, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Open a stream; its last event must be [DONE]."""
        request = body | {"stream": True}
        with self.client.stream("POST", "/chat/completions", json=request) as answer:
            require(answer.status_code == 200, f"status {answer.status_code}")
            kind = answer.headers.get("content-type", "")
            require(kind.startswith("text/event-stream"), f"content type is {kind!r}")
            yield _events(answer.iter_lines())


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise CaseFailedError("the stream ended without [DONE]")


def _add(said: Said, delta: dict[str, Any]) -> None:
    said.content += delta.get("content") or ""
    said.reasoning += _reasoning(delta)
    for call in delta.get("tool_calls") or []:
        index = call["index"]
        if index == len(said.calls):
            require(call.get("id"), "a call's first chunk has no id")
            require(call["function"].get("name"), "a call's first chunk has no name")
            said.calls.append({"id": call["id"], "function": {"arguments": ""}})
            said.calls[index]["function"]["name"] = call["function"]["name"]
        require(index == len(said.calls) - 1, f"call {index} after call {len(said.calls) - 1}")
        said.calls[index]["function"]["arguments"] += call["function"].get("arguments") or ""


def _reasoning(message: dict[str, Any]) -> str:
    return message.get("reasoning_content") or message.get("reasoning") or ""


def _checked(said: Said) -> Said:
    for marker in MARKUP:
        require(marker not in said.content, f"markup in the content: {said.content[:80]!r}")
        require(marker not in said.reasoning, f"markup in the reasoning: {said.reasoning[:80]!r}")
    return said
