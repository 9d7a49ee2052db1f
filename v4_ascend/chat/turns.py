"""Turns: the messages of a conversation, checked, and how they are arranged for a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from v4_ascend.chat.deltas import ToolCall

Role = Literal["system", "developer", "user", "tool", "assistant", "latest_reminder"]


@dataclass(frozen=True)
class ToolResult:
    """What a tool answered to the call `call_id`."""

    call_id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message, checked; after `arrange` a run of user and tool messages is one user turn."""

    role: Role
    text: str = ""
    blocks: tuple[str | ToolResult, ...] = ()  # user: texts and tool results, in order
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[str, ...] = ()  # function schemas as JSON
    response_format: str | None = None  # as JSON
    task: str | None = None
    ends: bool = True  # an assistant turn with `wo_eos` goes on
    is_context: bool = False  # encoded before; not written again


def arrange(turns: Sequence[Turn]) -> list[Turn]:
    """Merge runs of user and tool messages, and put tool results in the order of their calls."""
    return _sort_results(_merge(turns))


def last_user_index(turns: Sequence[Turn]) -> int | None:
    """Return the index of the last user or developer turn."""
    indices = [i for i, turn in enumerate(turns) if turn.role in ("user", "developer")]
    return indices[-1] if indices else None


def drop_developers(turns: Sequence[Turn]) -> list[Turn]:
    """Drop the developer turns before the last user turn, as goes with dropping reasoning."""
    last_user = last_user_index(turns)
    return [turn for i, turn in enumerate(turns) if turn.role != "developer" or i == last_user]


def _merge(turns: Sequence[Turn]) -> list[Turn]:
    merged: list[Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if turn.role not in ("user", "tool"):
            merged.append(turn)
        elif _takes(last, turn):
            assert last is not None
            merged[-1] = replace(last, blocks=(*last.blocks, *turn.blocks))
        else:
            merged.append(replace(turn, role="user"))
    return merged


def _takes(last: Turn | None, turn: Turn) -> bool:
    """Say whether `turn` continues the user turn `last`; a task closes it to further text."""
    if last is None or last.role != "user" or last.is_context != turn.is_context:
        return False
    return turn.role == "tool" or last.task is None


def _sort_results(turns: Sequence[Turn]) -> list[Turn]:
    order: dict[str, int] = {}
    arranged = []
    for turn in turns:
        if turn.tool_calls:
            order = {call.id: i for i, call in enumerate(turn.tool_calls)}
        arranged.append(replace(turn, blocks=_in_call_order(turn.blocks, order)))
    return arranged


def _in_call_order(
    blocks: tuple[str | ToolResult, ...], order: Mapping[str, int]
) -> tuple[str | ToolResult, ...]:
    # An unknown id sorts as the first call, as in the official encoder; text keeps its place.
    results = sorted(
        (block for block in blocks if isinstance(block, ToolResult)),
        key=lambda result: order.get(result.call_id, 0),
    )
    following = iter(results)
    return tuple(next(following) if isinstance(b, ToolResult) else b for b in blocks)
