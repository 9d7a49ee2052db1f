"""An answer as a row of blocks, one open at a time: how Responses and Messages stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from v4_ascend.chat import ArgumentsDelta, ContentDelta, Delta, ReasoningDelta, ToolCallDelta


@dataclass
class Block:
    """Reasoning, text, or a call with its arguments; `id` and `name` are a call's."""

    kind: Literal["reasoning", "text", "call"]
    index: int
    id: str = ""
    name: str = ""
    text: str = ""


@dataclass(frozen=True)
class Change:
    """A block begins, gets more text, or ends."""

    what: Literal["open", "more", "close"]
    block: Block
    text: str = ""


@dataclass
class Blocks:
    """Turns deltas into changes of blocks."""

    all: list[Block] = field(default_factory=list)
    _open: Block | None = None

    @property
    def has_calls(self) -> bool:
        """Whether tools were called."""
        return any(b.kind == "call" for b in self.all)

    def feed(self, deltas: Sequence[Delta]) -> Iterator[Change]:
        """Take what a token added."""
        for delta in deltas:
            match delta:
                case ReasoningDelta(text):
                    yield from self._more("reasoning", text)
                case ContentDelta(text):
                    yield from self._more("text", text)
                case ToolCallDelta(_, id, name):
                    yield from self._begin(Block("call", len(self.all), id, name))
                case ArgumentsDelta(_, text):
                    yield from self._more("call", text)

    def close(self) -> Iterator[Change]:
        """End the open block, if any."""
        if self._open is not None:
            block, self._open = self._open, None
            yield Change("close", block)

    def _begin(self, block: Block) -> Iterator[Change]:
        yield from self.close()
        self.all.append(block)
        self._open = block
        yield Change("open", block)

    def _more(self, kind: Literal["reasoning", "text", "call"], text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Block(kind, len(self.all)))
        assert self._open is not None
        self._open.text += text
        yield Change("more", self._open, text)
