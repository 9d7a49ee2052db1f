"""Answers of OpenAI's chat and text completions, whole or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from v4_ascend.chat import (
    ArgumentsDelta,
    ChatTokenizer,
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallDelta,
)
from v4_ascend.runtime.api.usage import Usage
from v4_ascend.runtime.choice import Event
from v4_ascend.runtime.messages import Sampled


@dataclass
class Envelope:
    """What all parts of one response share."""

    model: str
    is_chat: bool
    fingerprint: str
    usage: Usage
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """Return the response object around some choices."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}",
            "object": f"{kind}.chunk" if chunk and self.is_chat else kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def usage_json(self) -> dict[str, Any]:
        """Return the tokens counted so far."""
        u = self.usage
        return {
            "prompt_tokens": u.n_prompt,
            "completion_tokens": u.n_completion,
            "total_tokens": u.n_prompt + u.n_completion,
            "completion_tokens_details": {"reasoning_tokens": u.n_reasoning},
        }


def delta_json(delta: Delta) -> dict[str, Any]:
    """Return the ``delta`` of a chat chunk."""
    match delta:
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ContentDelta(text):
            return {"content": text}
        case ToolCallDelta(index, id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ArgumentsDelta(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def token_logprobs(sampled: Sampled, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Return one entry of a chat choice's ``logprobs.content``."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = list(tokenizer.token_bytes(token_id))
        return {"token": tokenizer.decode([token_id]), "logprob": logprob, "bytes": raw}

    first = entry(sampled.token_id, sampled.logprob or 0.0)
    return first | {"top_logprobs": [entry(i, p) for i, p in sampled.top_logprobs]}


@dataclass
class WholeChoice:
    """Collects one choice of a response that is not streamed."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    sampled: list[Sampled] = field(default_factory=list)
    finish: str | None = None

    def add(self, event: Event) -> None:
        """Take in what one token added."""
        self.sampled.append(event.sampled)
        for delta in event.deltas:
            match delta:
                case ReasoningDelta(text):
                    self.reasoning += text
                case ContentDelta(text):
                    self.content += text
                case ToolCallDelta(index, id, name):
                    function = {"name": name, "arguments": ""}
                    self.calls[index] = {"id": id, "type": "function", "function": function}
                case ArgumentsDelta(index, text):
                    self.calls[index]["function"]["arguments"] += text
        self.finish = finish_reason(event.finish, self.calls)

    def chat_json(self, index: int, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Return the choice of a chat completion."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or None}
        if not self.calls and self.content == "":
            message["content"] = ""
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [self.calls[i] for i in sorted(self.calls)]
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self.finish,
        }

    def text_json(self, index: int, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Return the choice of a text completion."""
        return {
            "index": index,
            "text": self.content,
            "logprobs": logprobs,
            "finish_reason": self.finish,
        }


def finish_reason(finish: str | None, calls: object) -> str | None:
    """A natural end after tool calls is one of its own."""
    return "tool_calls" if finish == "stop" and calls else finish


def completion_logprobs(sampled: Sequence[Sampled], tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Return the ``logprobs`` of a text completion's choice."""
    tokens = [tokenizer.decode([s.token_id]) for s in sampled]
    offsets = [sum(len(t) for t in tokens[:i]) for i in range(len(tokens))]
    top = [{tokenizer.decode([i]): p for i, p in s.top_logprobs} for s in sampled]
    return {
        "tokens": tokens,
        "token_logprobs": [s.logprob for s in sampled],
        "top_logprobs": top,
        "text_offset": offsets,
    }
