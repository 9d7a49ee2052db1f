"""A prompt as segments, so that text a client wrote never becomes a control token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from string import Formatter

from v4_ascend.chat.strings import DSML, THINK_END, THINK_START

_MARKER_FIELDS = {
    "dsml_token": DSML,
    "thinking_start_token": THINK_START,
    "thinking_end_token": THINK_END,
}


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt: exactly one marker (control), or text in which no marker counts."""

    text: str
    is_control: bool


@dataclass(frozen=True)
class Prompt:
    """An encoded conversation. No two text segments are neighbours, and none is empty."""

    segments: tuple[Segment, ...]

    @classmethod
    def join(cls, segments: Iterable[Segment]) -> Prompt:
        """Merge neighbouring text: the tokenizer must see it whole, as it may merge across."""
        merged: list[Segment] = []
        for is_control, run in groupby(segments, key=lambda segment: segment.is_control):
            if is_control:
                merged.extend(run)
            elif joined := "".join(segment.text for segment in run):
                merged.append(Segment(joined, is_control=False))
        return cls(tuple(merged))

    @property
    def text(self) -> str:
        """The whole prompt as one string, as the official encoder writes it."""
        return "".join(segment.text for segment in self.segments)


def control(marker: str) -> Segment:
    """Return `marker` as a control token."""
    return Segment(marker, is_control=True)


def plain(text: str) -> Segment:
    """Return `text` as what it is: text."""
    return Segment(text, is_control=False)


def fill(template: str, **fields: str | Iterable[Segment]) -> Iterator[Segment]:
    """Fill an official template: its marker fields are control, the given strings are text."""
    for literal, field, _, _ in Formatter().parse(template):
        yield plain(literal)
        if field is None:
            continue
        if field in _MARKER_FIELDS:
            yield control(_MARKER_FIELDS[field])
            continue
        value = fields[field]
        if isinstance(value, str):
            yield plain(value)
        else:
            yield from value
