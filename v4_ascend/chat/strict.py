"""The trained completion format to the letter; production reads with `parse_completion`."""

from __future__ import annotations

import re

from v4_ascend.chat.deltas import Completion, ToolCall
from v4_ascend.chat.dsml import json_or_text, new_call_id
from v4_ascend.chat.strings import (
    BOS,
    DSML,
    EOS,
    THINK_END,
    THINK_START,
    TOOL_CALLS_BLOCK,
    to_json,
)
from v4_ascend.errors import RequestError

_PARAMETER = re.compile(
    rf'<{DSML}parameter name="(.*?)" string="(true|false)">(.*?)</{DSML}parameter>\n', re.DOTALL
)
_INVOKE = re.compile(
    rf'<{DSML}invoke name="((?:(?!{DSML}).)*?)">\n'
    rf"((?:<{DSML}parameter .*?</{DSML}parameter>\n)*|\n)</{DSML}invoke>\n",
    re.DOTALL,
)
_BLOCK = re.compile(
    rf"\n\n<{DSML}{TOOL_CALLS_BLOCK}>\n(.*)</{DSML}{TOOL_CALLS_BLOCK}>(?:{EOS})?", re.DOTALL
)


def parse_strict(text: str, *, thinking: bool) -> Completion:
    """Parse a completion that follows the trained format to the letter, EOS included.

    Raises:
        RequestError: the text departs from it.

    """
    reasoning, rest = "", text
    if thinking:
        reasoning, found, rest = text.partition(THINK_END)
        if not found:
            raise RequestError(f"completion: no {THINK_END} ends the reasoning")
    content, found, _ = rest.partition(f"\n\n<{DSML}{TOOL_CALLS_BLOCK}")
    if found:
        calls = _strict_calls(rest[len(content) :])
    else:
        content, calls = rest.removesuffix(EOS), ()
        if content == rest:
            raise RequestError(f"completion: does not end in {EOS}")
    for marker in (BOS, EOS, THINK_START, THINK_END, DSML):
        if marker in reasoning or marker in content:
            raise RequestError(f"completion: {marker} inside the reasoning or content")
    return Completion(reasoning, content, calls)


def _strict_calls(block: str) -> tuple[ToolCall, ...]:
    whole = _BLOCK.fullmatch(block)
    if whole is None:
        raise RequestError(f"completion: not a complete tool_calls block: {block[:80]!r}")
    invocations = whole[1]
    calls = []
    position = 0
    while position < len(invocations):
        invoke = _INVOKE.match(invocations, position)
        if invoke is None:
            excerpt = invocations[position : position + 80]
            raise RequestError(f"completion: not a complete invoke: {excerpt!r}")
        calls.append(ToolCall(new_call_id(), invoke[1], _strict_arguments(invoke[2])))
        position = invoke.end()
    return tuple(calls)


def _strict_arguments(parameters: str) -> str:
    members: dict[str, str] = {}
    position = 0
    while position < len(parameters.rstrip("\n")):
        parameter = _PARAMETER.match(parameters, position)
        if parameter is None:
            excerpt = parameters[position : position + 80]
            raise RequestError(f"completion: not a complete parameter: {excerpt!r}")
        key, is_text, value = parameter.groups()
        if key in members:
            raise RequestError(f"completion: parameter {key!r} occurs twice")
        members[key] = to_json(value) if is_text == "true" else json_or_text(value)
        position = parameter.end()
    return "{" + ", ".join(f"{to_json(key)}: {value}" for key, value in members.items()) + "}"
