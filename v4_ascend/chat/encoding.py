"""Conversations as prompts, byte for byte as DeepSeek's encoder writes them.

Source: deepseek-ai/DeepSeek-V4-Pro, encoding/encoding_dsv4.py; the 0731 release differs in the
reasoning-effort texts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from v4_ascend.chat.dsml import tool_calls_to_dsml
from v4_ascend.chat.messages import RawMessages, read_messages, read_response_format, read_tools
from v4_ascend.chat.prompt import Prompt, Segment, control, fill, plain
from v4_ascend.chat.strings import (
    ASSISTANT,
    BOS,
    EFFORT_PREFIXES,
    EOS,
    LATEST_REMINDER,
    RESPONSE_FORMAT_TEMPLATE,
    TASKS,
    THINK_END,
    THINK_START,
    TOOL_OUTPUT_TEMPLATE,
    TOOLS_TEMPLATE,
    USER,
    Effort,
    Release,
)
from v4_ascend.chat.turns import ToolResult, Turn, arrange, drop_developers, last_user_index


@dataclass(frozen=True, kw_only=True)
class _Conversation:
    turns: Sequence[Turn]
    thinking: bool
    first_with_reasoning: int

    def has_reasoning(self, index: int) -> bool:
        """Say whether the prompt holds what the model thinks in or after turn `index`."""
        return self.thinking and index >= self.first_with_reasoning


def encoder_release(config: Mapping[str, Any]) -> Release:
    """Choose the encoder of a checkpoint from its config.json: DSpark keys mean the later one."""
    return "0731" if any(key.startswith("dspark_") for key in config) else "april"


def encode_messages(
    messages: RawMessages,
    *,
    thinking: bool,
    reasoning_effort: Effort | None = None,
    drop_thinking: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    release: Release = "april",
    response_format: Mapping[str, Any] | None = None,
    context: RawMessages = (),
) -> Prompt:
    """Encode a conversation up to the point where the model goes on.

    `context` are messages whose prompt exists already: only what follows them is written.
    `tools` and `response_format` go to the first system message, an empty one if there is none.
    Reasoning before the last user message is dropped unless there are tools or `drop_thinking`
    is off.

    Raises:
        RequestError: a message is wrong; its `param` is the field, for example `messages[3].role`.

    """
    earlier = read_messages(context, is_context=True)
    turns = _instruct(
        arrange([*earlier, *read_messages(messages, is_context=False)]),
        tools=read_tools(tools, "tools"),
        response_format=read_response_format(response_format, "response_format"),
    )
    first_with_reasoning = 0
    if thinking and drop_thinking and not any(turn.tools for turn in turns):
        turns = drop_developers(turns)
        first_with_reasoning = last_user_index(turns) or 0
    conversation = _Conversation(
        turns=turns, thinking=thinking, first_with_reasoning=first_with_reasoning
    )
    segments = _write(conversation)
    if not earlier:
        effort = EFFORT_PREFIXES[release][reasoning_effort or "low"] if thinking else ""
        segments = chain((control(BOS), plain(effort)), segments)
    return Prompt.join(segments)


def _instruct(
    turns: list[Turn], *, tools: tuple[str, ...], response_format: str | None
) -> list[Turn]:
    """Add tools and response format to the first system turn."""
    if not tools and response_format is None:
        return turns
    index = next((i for i, turn in enumerate(turns) if turn.role == "system"), None)
    if index is None:
        turns = [Turn(role="system", is_context=turns[0].is_context), *turns]
        index = 0
    system = turns[index]
    instructed = replace(
        system,
        tools=(*system.tools, *tools),
        response_format=system.response_format if response_format is None else response_format,
    )
    return [*turns[:index], instructed, *turns[index + 1 :]]


def _write(conversation: _Conversation) -> Iterator[Segment]:
    for index, turn in enumerate(conversation.turns):
        if not turn.is_context:
            yield from _write_turn(conversation, index)
            yield from _write_transition(conversation, index)


def _write_turn(conversation: _Conversation, index: int) -> Iterator[Segment]:
    turn = conversation.turns[index]
    match turn.role:
        case "system":
            yield from _instructions(turn)
        case "developer":
            yield control(USER)
            yield from _instructions(turn)
        case "user":
            yield control(USER)
            yield plain("\n\n".join(_block_text(block) for block in turn.blocks))
        case "latest_reminder":
            yield control(LATEST_REMINDER)
            yield plain(turn.text)
        case "assistant":
            yield from _assistant(conversation, index)


def _instructions(turn: Turn) -> Iterator[Segment]:
    yield plain(turn.text)
    if turn.tools:
        yield plain("\n\n")
        yield from fill(TOOLS_TEMPLATE, tool_schemas="\n".join(turn.tools))
    if turn.response_format is not None:
        yield plain("\n\n")
        yield from fill(RESPONSE_FORMAT_TEMPLATE, schema=turn.response_format)


def _block_text(block: str | ToolResult) -> str:
    if isinstance(block, ToolResult):
        return TOOL_OUTPUT_TEMPLATE.format(content=block.text)
    return block


def _assistant(conversation: _Conversation, index: int) -> Iterator[Segment]:
    turn = conversation.turns[index]
    answers_task = index > 0 and conversation.turns[index - 1].task is not None
    if conversation.has_reasoning(index) and not answers_task:
        yield plain(turn.reasoning)
        yield control(THINK_END)
    yield plain(turn.text)
    if turn.tool_calls:
        yield plain("\n\n")
        yield from tool_calls_to_dsml(turn.tool_calls)
    if turn.ends:
        yield control(EOS)


def _write_transition(conversation: _Conversation, index: int) -> Iterator[Segment]:
    """Write what hands over to the model, where it speaks next."""
    turns = conversation.turns
    if index + 1 < len(turns) and turns[index + 1].role not in ("assistant", "latest_reminder"):
        return
    turn = turns[index]
    if turn.task == "action":
        yield control(ASSISTANT)
        yield control(THINK_START if conversation.thinking else THINK_END)
        yield control(TASKS["action"])
    elif turn.task is not None:
        yield control(TASKS[turn.task])
    elif turn.role in ("user", "developer"):
        yield control(ASSISTANT)
        yield control(THINK_START if conversation.has_reasoning(index) else THINK_END)
