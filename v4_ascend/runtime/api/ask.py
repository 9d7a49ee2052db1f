"""A request as every API reads it into: the one form the service takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from v4_ascend.chat import Effort
from v4_ascend.chat.grammar import Piece
from v4_ascend.errors import RequestError
from v4_ascend.runtime.api.controls import Controls

# OpenAI's and Anthropic's words, and what the official encoder makes of them.
EFFORTS: dict[str, Effort] = {
    "minimal": "low", "low": "low", "medium": "low", "high": "high", "xhigh": "max", "max": "max",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What an answer may be. `shown` is what the prompt says about it, `param` who asked."""

    piece: Piece
    param: str
    shown: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A conversation to go on with; messages and tools have the form of chat completions."""

    messages: list[dict[str, Any]]
    controls: Controls
    max_tokens: int | None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] = "auto"
    named_tool: str | None = None
    are_calls_parallel: bool = True
    thinking: bool = False
    effort: Effort | None = None
    answer: Answer | None = None
    n_logprobs: int | None = None

    @property
    def offered(self) -> Sequence[dict[str, Any]]:
        """The tools the prompt tells of."""
        return [] if self.tool_choice == "none" else self.tools


def effort_of(word: Any, param: str) -> Effort | None:
    """Read an effort; None where none is given.

    Raises:
        RequestError: it is no effort.
    """
    if word is None or word == "none":
        return None
    if not isinstance(word, str) or word not in EFFORTS:
        raise RequestError(
            f"{param}: must be one of {', '.join(EFFORTS)}, got {word!r}", param=param
        )
    return EFFORTS[word]
