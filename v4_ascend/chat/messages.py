"""The messages of an API request, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NoReturn, get_args

from v4_ascend.chat.deltas import ToolCall
from v4_ascend.chat.strings import TASKS, to_json
from v4_ascend.chat.turns import Role, ToolResult, Turn
from v4_ascend.errors import RequestError

RawMessages = Sequence[Mapping[str, Any]]


def read_messages(messages: object, *, is_context: bool) -> list[Turn]:
    """Check messages of a request.

    Raises:
        RequestError: a message is wrong; its `param` is the field, for example `messages[3].role`.

    """
    name = "context" if is_context else "messages"
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        _refuse(name, f"must be a list of messages, not {_kind(messages)}")
    if not messages and not is_context:
        _refuse(name, "is empty; there must be at least one message")
    turns = [_read_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]
    return [replace(turn, is_context=is_context) for turn in turns]


def read_tools(tools: object, where: str) -> tuple[str, ...]:
    """Check tool definitions; return each function object as JSON."""
    if tools is None:
        return ()
    if not isinstance(tools, list):
        _refuse(where, f"must be a list of tools, not {_kind(tools)}")
    return tuple(_read_tool(tool, f"{where}[{i}]") for i, tool in enumerate(tools))


def _read_message(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping):
        _refuse(where, f"must be an object, not {_kind(message)}")
    role = message.get("role")
    if role not in get_args(Role):
        _refuse(f"{where}.role", f"{role!r} is not a role; use one of {', '.join(get_args(Role))}")
    if message.get("tools") and role not in ("system", "developer"):
        _refuse(f"{where}.tools", f"only system and developer messages define tools, not {role}")
    if message.get("task") is not None and role not in ("user", "developer"):
        _refuse(f"{where}.task", f"only user and developer messages have a task, not {role}")
    match role:
        case "system" | "developer":
            return _read_instructions(role, message, where)
        case "user":
            text = _text(message.get("content"), f"{where}.content")
            return Turn(role="user", blocks=(text,), task=_task(message, where))
        case "tool":
            return Turn(role="tool", blocks=(_read_tool_result(message, where),))
        case "assistant":
            return _read_assistant(message, where)
        case _:
            text = _text(message.get("content"), f"{where}.content")
            return Turn(role="latest_reminder", text=text)


def _read_instructions(
    role: Literal["system", "developer"], message: Mapping[str, Any], where: str
) -> Turn:
    text = _text(message.get("content"), f"{where}.content")
    if role == "developer" and not text:
        _refuse(f"{where}.content", "is empty; a developer message must say something")
    return Turn(
        role=role,
        text=text,
        tools=read_tools(message.get("tools"), f"{where}.tools"),
        response_format=read_response_format(
            message.get("response_format"), f"{where}.response_format"
        ),
        task=_task(message, where),
    )


def read_response_format(response_format: object, where: str) -> str | None:
    """Check a response format; return it as JSON."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        _refuse(where, f"must be an object, not {_kind(response_format)}")
    return _encodable(to_json(response_format), where) if response_format else None


def _read_tool_result(message: Mapping[str, Any], where: str) -> ToolResult:
    call_id = message.get("tool_call_id")
    if not isinstance(call_id, str) or not call_id:
        _refuse(f"{where}.tool_call_id", "is missing; a tool message must name the call it answers")
    content = message.get("content")
    if isinstance(content, list):
        parts = [_result_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        return ToolResult(call_id, "\n\n".join(parts))
    return ToolResult(call_id, _text(content, f"{where}.content"))


def _result_part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        _refuse(where, f"must be an object, not {_kind(part)}")
    if part.get("type") == "text":
        return _string(part.get("text"), f"{where}.text")
    return _encodable(f"[Unsupported {part.get('type')}]", f"{where}.type")


def _read_assistant(message: Mapping[str, Any], where: str) -> Turn:
    content, calls = message.get("content"), message.get("tool_calls")
    # Servers differ in the name; `reasoning_content` is DeepSeek's.
    key = "reasoning_content" if message.get("reasoning_content") is not None else "reasoning"
    reasoning = message.get(key)
    if content is None and reasoning is None and not calls:
        _refuse(f"{where}.content", "is missing; so are reasoning_content and tool_calls")
    return Turn(
        role="assistant",
        text="" if content is None else _text(content, f"{where}.content"),
        reasoning="" if reasoning is None else _string(reasoning, f"{where}.{key}"),
        tool_calls=_read_calls(calls, f"{where}.tool_calls"),
        ends=not message.get("wo_eos", False),
    )


def _read_calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list):
        _refuse(where, f"must be a list of tool calls, not {_kind(calls)}")
    return tuple(_read_call(call, f"{where}[{i}]") for i, call in enumerate(calls))


def _read_call(call: object, where: str) -> ToolCall:
    if not isinstance(call, Mapping):
        _refuse(where, f"must be an object, not {_kind(call)}")
    function = call.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{where}.function", f"must be an object, not {_kind(function)}")
    return ToolCall(
        id=_string(call.get("id"), f"{where}.id"),
        name=_string(function.get("name"), f"{where}.function.name"),
        arguments=_string(function.get("arguments"), f"{where}.function.arguments"),
    )


def _read_tool(tool: object, where: str) -> str:
    if not isinstance(tool, Mapping):
        _refuse(where, f"must be an object, not {_kind(tool)}")
    if tool.get("type", "function") != "function":
        _refuse(f"{where}.type", f"{tool['type']!r} is not supported; only 'function' is")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{where}.function", f"must be an object, not {_kind(function)}")
    _string(function.get("name"), f"{where}.function.name")
    return _encodable(to_json(function), f"{where}.function")


def _task(message: Mapping[str, Any], where: str) -> str | None:
    task = message.get("task")
    if task is None:
        return None
    if not isinstance(task, str) or task not in TASKS:
        _refuse(f"{where}.task", f"{task!r} is not a task; use one of {', '.join(TASKS)}")
    return task


def _text(content: object, where: str) -> str:
    """Read content: a string, or a list of text parts, which stand a blank line apart."""
    if isinstance(content, list):
        return "\n\n".join(_text_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    if content is None:
        _refuse(where, "is missing; it must be a string or a list of text parts")
    return _string(content, where)


def _text_part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        _refuse(where, f"must be an object, not {_kind(part)}")
    if part.get("type") != "text":
        _refuse(f"{where}.type", f"{part.get('type')!r} is not supported; only 'text' is")
    return _string(part.get("text"), f"{where}.text")


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        _refuse(where, f"must be a string, not {_kind(value)}")
    return _encodable(value, where)


def _encodable(text: str, where: str) -> str:
    """Refuse half of a surrogate pair: JSON can say one, UTF-8 and so the tokenizer cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        _refuse(where, f"character {e.start} is U+{ord(text[e.start]):04X}, half a surrogate pair")
    return text


def _kind(value: object) -> str:
    """Name the JSON type of `value`."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case Mapping():
            return "an object"
        case _:
            return "a list"


def _refuse(where: str, problem: str) -> NoReturn:
    raise RequestError(f"{where}: {problem}", param=where)
