"""What a completion is made of, whole and in the pieces a stream delivers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A tool call begins; its arguments follow under the same index."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the JSON text of one tool call's arguments."""

    index: int
    text: str


Delta = ReasoningDelta | ContentDelta | ToolCallDelta | ArgumentsDelta


@dataclass(frozen=True)
class ToolCall:
    """A tool call; `arguments` is JSON text, cut short if the completion was."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Completion:
    """A completion taken apart."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
