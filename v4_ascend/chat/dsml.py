"""Tool calls as DSML, the markup V4 writes them in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

from v4_ascend.chat.deltas import ToolCall
from v4_ascend.chat.prompt import Segment, fill, plain
from v4_ascend.chat.strings import (
    PARAMETER_TEMPLATE,
    TOOL_CALL_TEMPLATE,
    TOOL_CALLS_BLOCK,
    TOOL_CALLS_TEMPLATE,
    to_json,
)


def new_call_id() -> str:
    """Make an id for a tool call, unique over conversations."""
    return f"call_{uuid4().hex}"


def tool_calls_to_dsml(calls: Sequence[ToolCall]) -> Iterator[Segment]:
    """Write tool calls as the block an assistant turn ends with."""
    yield from fill(
        TOOL_CALLS_TEMPLATE,
        tc_block_name=TOOL_CALLS_BLOCK,
        tool_calls=_lines([_invocation(call) for call in calls]),
    )


def _invocation(call: ToolCall) -> Iterator[Segment]:
    parameters = [_parameter(key, value) for key, value in _arguments(call.arguments).items()]
    return fill(TOOL_CALL_TEMPLATE, name=call.name, arguments=_lines(parameters))


def _arguments(text: str) -> dict[str, Any]:
    """Read a call's arguments; what is no JSON object becomes one parameter `arguments`."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return {"arguments": text}
    return arguments if isinstance(arguments, dict) else {"arguments": text}


def _parameter(key: str, value: Any) -> Iterator[Segment]:
    is_text = isinstance(value, str)
    return fill(
        PARAMETER_TEMPLATE,
        key=key,
        is_str="true" if is_text else "false",
        value=value if is_text else to_json(value),
    )


def _lines(parts: Sequence[Iterator[Segment]]) -> Iterator[Segment]:
    for index, part in enumerate(parts):
        if index:
            yield plain("\n")
        yield from part


def json_or_text(value: str) -> str:
    """Return a parameter value as JSON: itself where it is valid JSON, else as a JSON string."""
    try:
        json.loads(value, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return to_json(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
