"""Requests of Anthropic's Messages API, as conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from v4_ascend.errors import RequestError
from v4_ascend.runtime.api.ask import Ask, effort_of
from v4_ascend.runtime.api.controls import Controls
from v4_ascend.runtime.api.openai_bodies import answer_of_format

# Change nothing about the answer. Thinking has no budget here: `max_tokens` bounds all of it.
IGNORED = frozenset({"metadata", "service_tier", "inference_geo", "cache_control", "speed"})


class _Block(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant", "system"]
    content: str | list[_Block]


class CountBody(BaseModel):
    """``/v1/messages/count_tokens``: what makes the prompt."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[_Message] = Field(min_length=1)
    system: str | list[_Block] = ""
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: dict[str, Any] = Field(default_factory=lambda: {"type": "auto"})
    thinking: dict[str, Any] = Field(default_factory=lambda: {"type": "disabled"})
    output_config: dict[str, Any] = Field(default_factory=dict)


class MessagesBody(CountBody):
    """``/v1/messages``."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    stop_sequences: list[str] = Field(default_factory=list)
    stream: bool = False


def messages_ask(body: MessagesBody) -> Ask:
    """Read a body into a conversation, and how to go on with it."""
    controls = Controls(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
    )
    controls.require_stops("stop_sequences")
    return conversation(body, controls, body.max_tokens)


def conversation(
    body: CountBody, controls: Controls | None = None, max_tokens: int | None = None
) -> Ask:
    """Read what makes the prompt.

    Raises:
        RequestError: something in it is wrong or cannot be had here.
    """
    kinds: dict[str, Literal["auto", "none", "required"]] = {
        "auto": "auto", "none": "none", "any": "required", "tool": "required",
    }  # fmt: skip
    kind, named = body.tool_choice.get("type"), body.tool_choice.get("name")
    if not isinstance(kind, str) or kind not in kinds or (kind == "tool") != isinstance(named, str):
        _refuse("tool_choice", f"must be auto, any, none or tool with a name, got {kind!r}")
    shape = body.output_config.get("format")
    return Ask(
        messages=list(_messages(body)),
        controls=controls or Controls(),
        max_tokens=max_tokens,
        tools=[_tool(tool, i) for i, tool in enumerate(body.tools)],
        tool_choice=kinds[kind],
        named_tool=named,
        are_calls_parallel=not body.tool_choice.get("disable_parallel_tool_use", False),
        thinking=body.thinking.get("type") != "disabled",
        effort=effort_of(body.output_config.get("effort"), "output_config.effort"),
        answer=answer_of_format(shape, "output_config.format") if shape is not None else None,
    )


def _messages(body: CountBody) -> Iterator[dict[str, Any]]:
    if system := _text(body.system, "system"):
        yield {"role": "system", "content": system}
    for i, message in enumerate(body.messages):
        where = f"messages[{i}].content"
        if message.role == "assistant":
            yield _assistant(message.content, where)
        elif isinstance(message.content, str) or message.role == "system":
            yield {"role": message.role, "content": _text(message.content, where)}
        else:
            yield from _user(message.content, where)


def _user(blocks: list[_Block], where: str) -> Iterator[dict[str, Any]]:
    """Yield a message for each block: the encoder joins them to one turn again."""
    for i, block in enumerate(blocks):
        here, extra = f"{where}[{i}]", block.model_extra or {}
        if block.type == "tool_result":
            text = _text(_result(extra.get("content", ""), f"{here}.content"), f"{here}.content")
            yield {"role": "tool", "tool_call_id": extra.get("tool_use_id"), "content": text}
        else:
            yield {"role": "user", "content": _text([block], here)}


def _result(content: Any, where: str) -> str | list[_Block]:
    if isinstance(content, str):
        return content
    try:
        return [_Block.model_validate(b) for b in content]
    except (TypeError, ValidationError):
        _refuse(where, "must be a string or a list of blocks")


def _assistant(content: str | list[_Block], where: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(content):
        extra = block.model_extra or {}
        match block.type:
            case "text":
                texts.append(str(extra.get("text", "")))
            case "thinking":
                thoughts.append(str(extra.get("thinking", "")))
            case "redacted_thinking":
                pass  # of another server: nothing here could read it
            case "tool_use":
                arguments = json.dumps(extra.get("input", {}), ensure_ascii=False)
                function = {"name": extra.get("name"), "arguments": arguments}
                calls.append({"id": extra.get("id"), "type": "function", "function": function})
            case other:
                _refuse(f"{where}[{i}]", f"{other!r} is not supported in an assistant's message")
    said = {"role": "assistant", "content": "".join(texts), "tool_calls": calls}
    return said | {"reasoning_content": "".join(thoughts)}


def _text(content: str | list[_Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for i, block in enumerate(content):
        if block.type != "text" or not isinstance((block.model_extra or {}).get("text"), str):
            _refuse(f"{where}[{i}]", f"{block.type!r} is not supported here; only text is")
    return "\n\n".join(block.model_extra["text"] for block in content if block.model_extra)


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom" or "input_schema" not in tool:
        kind = tool.get("type", "custom")
        _refuse(f"tools[{index}]", f"{kind!r} cannot be run here; only tools with an input_schema")
    function = {k: tool[k] for k in ("name", "description", "strict") if k in tool}
    return {"type": "function", "function": function | {"parameters": tool["input_schema"]}}


def _refuse(param: str, problem: str) -> NoReturn:
    raise RequestError(f"{param}: {problem}", param=param)
