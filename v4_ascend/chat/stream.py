"""Completions taken apart while they arrive: reasoning, answer and tool calls, never markup."""

from __future__ import annotations

import re
from enum import Enum, auto

from v4_ascend.chat.calls import CallWriter
from v4_ascend.chat.deltas import (
    ArgumentsDelta,
    Completion,
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
)
from v4_ascend.chat.held_back import HeldBack
from v4_ascend.chat.strings import ADDED_TOKENS, DSML, EOS, THINK_END, THINK_START

_OPEN, _CLOSE = f"<{DSML}", f"</{DSML}"
_TOKENS = [token.content for token in ADDED_TOKENS]
# The blank line before a tool-call block belongs to the block, not to the text.
_TEXT_MARKUP = re.compile(rf"\n{{0,2}}<{DSML}|</{DSML}|" + "|".join(map(re.escape, _TOKENS)))
_CALL_MARKUP = re.compile(f"</?{DSML}|{EOS}")
_HELD_IN_TEXT = HeldBack([f"\n\n{_OPEN}", f"\n{_OPEN}", _OPEN, _CLOSE, *_TOKENS])
_HELD_IN_CALLS = HeldBack([_OPEN, _CLOSE, EOS])
# A value may contain the end token: even complete it is held, as it ends a value it is last in.
_HELD_IN_VALUE = HeldBack([_CLOSE, f"{EOS}."])
_CUT_MARKUP = re.compile(r"\n{0,2}</?｜.*\Z", re.DOTALL)

# What follows "<｜DSML｜": a name and attributes up to ">", or to the end of a tag left open.
# Inside quotes ">" is a character, but no quote reaches beyond its line or into another tag.
_TAG_REST = re.compile(
    r'[ \t]*(?P<name>\w*)(?P<attributes>(?:[^"<>\n]|"[^"<\n]*(?:"|(?=[<\n])))*)(?:>|(?=[<\n]))'
)
_ATTRIBUTE = re.compile(r"""(\w+)\s*=\s*(?:"([^"]*)|'([^']*)|([^\s"'>]+))""")


class _State(Enum):
    TEXT = auto()  # reasoning or answer
    CALLS = auto()  # in a tool-call block outside a call, or behind a block
    CALL = auto()  # in a call, between parameters
    VALUE = auto()  # in a parameter
    OPENING = auto()  # behind "<｜DSML｜"
    CLOSING = auto()  # behind "</｜DSML｜"
    DONE = auto()  # behind the end token


class StreamParser:
    """Parses one completion from chunks of its text, wherever they are cut.

    Feed all that the model wrote, end token included: it tells a call the model has finished
    from one that was cut off, whose arguments stay incomplete JSON.

    Lenient where V4 models are known to stray: a tool call ends the reasoning if `</think>` is
    missing; the block may have any name or none; a parameter without `string` is JSON if it can
    be; tags may be left open. Markers of the tokenizer are dropped from reasoning and answer.
    Without `tools`, calls are read and dropped.
    """

    def __init__(self, thinking: bool, tools: bool) -> None:
        self._in_reasoning = thinking
        self._has_spoken = False
        self._calls = CallWriter(report=tools)
        self._buffer = ""
        self._state = _State.TEXT

    def feed(self, text: str) -> list[Delta]:
        """Take more of the completion; return what it is certain to mean."""
        self._buffer += text
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """Return what was held back, as no more text will follow."""
        deltas: list[Delta] = []
        if self._state is _State.TEXT:
            self._say(_CUT_MARKUP.sub("", self._buffer), deltas)
        elif self._state is _State.VALUE:
            value = self._buffer.removesuffix(EOS)
            if value != self._buffer:
                deltas += [*self._calls.value(value), *self._calls.end()]
            else:
                deltas += self._calls.cut_value(_CUT_MARKUP.sub("", value))
        self._buffer = ""
        self._state = _State.DONE
        return deltas

    def _step(self, deltas: list[Delta]) -> bool:
        """Read one piece of the buffer; return False when it takes more text to go on."""
        match self._state:
            case _State.TEXT:
                return self._text(deltas)
            case _State.CALLS:
                return self._between_calls()
            case _State.CALL:
                return self._between_parameters(deltas)
            case _State.VALUE:
                return self._in_value(deltas)
            case _State.OPENING | _State.CLOSING:
                return self._tag(deltas)
            case _State.DONE:
                self._buffer = ""
                return False

    def _text(self, deltas: list[Delta]) -> bool:
        markup = _TEXT_MARKUP.search(self._buffer)
        if markup is None:
            certain, self._buffer = _HELD_IN_TEXT.split(self._buffer)
            self._say(certain, deltas)
            return False
        self._say(self._take(markup), deltas)
        token = markup[0].lstrip("\n")
        if token in (_OPEN, _CLOSE):
            self._state = _State.OPENING if token == _OPEN else _State.CLOSING
        elif token == EOS:
            self._state = _State.DONE
        elif token == THINK_END:
            self._in_reasoning = False
        elif token == THINK_START and not self._has_spoken:
            self._in_reasoning = True
        return True

    def _between_calls(self) -> bool:
        self._buffer = self._buffer.lstrip()
        certain, _ = _HELD_IN_CALLS.split(self._buffer)
        # Text that is no tag ends the block; `_text` reads tags as well.
        self._state = _State.TEXT if certain else _State.CALLS
        return bool(certain)

    def _between_parameters(self, deltas: list[Delta]) -> bool:
        markup = _CALL_MARKUP.search(self._buffer)
        if markup is None:
            _, self._buffer = _HELD_IN_CALLS.split(self._buffer)
            return False
        self._take(markup)
        if markup[0] == EOS:
            deltas += self._calls.end()
            self._state = _State.DONE
        else:
            self._state = _State.OPENING if markup[0] == _OPEN else _State.CLOSING
        return True

    def _in_value(self, deltas: list[Delta]) -> bool:
        value, closing, rest = self._buffer.partition(_CLOSE)
        if closing:
            deltas += [*self._calls.value(value), *self._calls.end_value()]
            self._buffer, self._state = rest, _State.CLOSING
        else:
            certain, self._buffer = _HELD_IN_VALUE.split(value)
            deltas += self._calls.value(certain)
        return bool(closing)

    def _tag(self, deltas: list[Delta]) -> bool:
        rest = _TAG_REST.match(self._buffer)
        if rest is None:
            return False
        self._take(rest)
        if self._state is _State.OPENING:
            self._open(rest["name"], _attributes(rest["attributes"]), deltas)
        else:
            self._close(rest["name"], deltas)
        return True

    def _open(self, name: str, attributes: dict[str, str], deltas: list[Delta]) -> None:
        self._state = _State.CALL if self._calls.is_open else _State.CALLS
        if name == "invoke":
            self._in_reasoning = False
            deltas += [*self._calls.end(), *self._calls.begin(attributes.get("name"))]
            self._state = _State.CALL
        elif name == "parameter" and self._calls.is_open:
            is_text = attributes.get("string") == "true"
            deltas += self._calls.begin_value(attributes.get("name"), is_text=is_text)
            self._state = _State.VALUE

    def _close(self, name: str, deltas: list[Delta]) -> None:
        if name == "parameter":
            self._state = _State.CALL if self._calls.is_open else _State.CALLS
        else:
            deltas += self._calls.end()
            self._state = _State.CALLS

    def _take(self, found: re.Match[str]) -> str:
        """Remove the buffer up to the end of `found`; return what came before it."""
        before, self._buffer = self._buffer[: found.start()], self._buffer[found.end() :]
        return before

    def _say(self, text: str, deltas: list[Delta]) -> None:
        if text:
            self._has_spoken |= not text.isspace()
            deltas.append(ReasoningDelta(text) if self._in_reasoning else ContentDelta(text))


def _attributes(text: str) -> dict[str, str]:
    return {name: "".join(values) for name, *values in _ATTRIBUTE.findall(text)}


def parse_completion(text: str, thinking: bool, tools: bool = True) -> Completion:
    """Parse a whole completion, as `StreamParser` does."""
    parser = StreamParser(thinking, tools)
    return join_deltas([*parser.feed(text), *parser.finish()])


def join_deltas(deltas: list[Delta]) -> Completion:
    """Put the pieces of a stream together."""
    starts = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    arguments: dict[int, list[str]] = {start.index: [] for start in starts}
    for delta in deltas:
        if isinstance(delta, ArgumentsDelta):
            arguments[delta.index].append(delta.text)
    return Completion(
        reasoning="".join(d.text for d in deltas if isinstance(d, ReasoningDelta)),
        content="".join(d.text for d in deltas if isinstance(d, ContentDelta)),
        tool_calls=tuple(ToolCall(s.id, s.name, "".join(arguments[s.index])) for s in starts),
    )
