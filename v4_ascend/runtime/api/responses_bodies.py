"""Requests of OpenAI's Responses API, as conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from pydantic import Field

from v4_ascend.errors import RequestError
from v4_ascend.runtime.api.ask import Ask, effort_of
from v4_ascend.runtime.api.controls import Controls
from v4_ascend.runtime.api.openai_bodies import answer_of_format

IGNORED = frozenset(
    {"client_metadata", "include", "metadata", "prompt_cache_key", "prompt_cache_options",
     "prompt_cache_retention", "safety_identifier", "service_tier", "store", "stream_options",
     "truncation", "user"}
)  # fmt: skip


class ResponsesBody(Controls):
    """``/v1/responses``."""

    model: str
    input: str | list[dict[str, Any]] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any] = Field(default_factory=dict)
    text: dict[str, Any] = Field(default_factory=dict)
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool = False
    stream: bool = False


def responses_ask(body: ResponsesBody) -> Ask:
    """Read a body into a conversation.

    Raises:
        RequestError: it asks for what is not kept or cannot be run here, or is wrong.
    """
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            _refuse(name, "no response is kept here; send the whole input, and wait for the answer")
    effort = effort_of(body.reasoning.get("effort"), "reasoning.effort")
    shape = body.text.get("format")
    choice = body.tool_choice
    return Ask(
        messages=_messages(body),
        controls=body,
        max_tokens=body.max_output_tokens,
        tools=[_tool(tool, i) for i, tool in enumerate(body.tools)],
        tool_choice=choice if isinstance(choice, str) else "required",
        named_tool=None if isinstance(choice, str) else _named(choice),
        are_calls_parallel=body.parallel_tool_calls,
        thinking=effort is not None,
        effort=effort,
        answer=answer_of_format(shape, "text.format") if shape is not None else None,
    )


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """Return messages of chat completions.

    Instructions in front become one system message. Reasoning and calls belong to one assistant
    message with the text between them.
    """
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    out: list[dict[str, Any]] = []
    if body.instructions:
        out.append({"role": "system", "content": body.instructions})
    for i, item in enumerate(items):
        _add(out, item, f"input[{i}]")
    return out


def _add(out: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message" and item.get("role") == "assistant":
        said = _assistant(out)
        said["content"] = said["content"] + _text(item.get("content"), f"{where}.content")
    elif kind == "message":
        role, text = item.get("role"), _text(item.get("content"), f"{where}.content")
        if role not in ("user", "system", "developer"):
            _refuse(f"{where}.role", f"must be user, assistant, system or developer, got {role!r}")
        if role != "user" and all(m["role"] == "system" for m in out) and out:
            out[0]["content"] += f"\n\n{text}"
        else:
            # DeepSeek's own role developer is another thing: OpenAI's is the system's.
            out.append({"role": "user" if role == "user" else "system", "content": text})
    elif kind == "reasoning":
        text = _text(item.get("content") or item.get("summary") or [], f"{where}.content")
        said = _assistant(out)
        said["reasoning_content"] = said.get("reasoning_content", "") + text
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _assistant(out).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        text = _text(item.get("output"), f"{where}.output")
        out.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    else:
        _refuse(f"{where}.type", f"{kind!r} is not supported here")


def _assistant(out: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant message that is being read; a new one behind any other."""
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        _refuse(where, "must be a string or a list of parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            _refuse(f"{where}[{i}]", f"{kind!r} is not supported; only text is")
        texts.append(part["text"])
    return "\n\n".join(texts)


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        _refuse(f"tools[{index}]", f"{tool.get('type')!r} cannot be run here; only functions can")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _named(choice: Mapping[str, Any]) -> str:
    name = choice.get("name")
    if choice.get("type") != "function" or not isinstance(name, str):
        _refuse("tool_choice", 'must be auto, none, required or {"type": "function", "name": ...}')
    return name


def _refuse(param: str, problem: str) -> NoReturn:
    raise RequestError(f"{param}: {problem}", param=param)
