"""Log lines worth a look, in bounded memory: where they are, when they are from, who wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

CHUNK_BYTES = 1 << 20
LINE_CHARS = 2000
LOOK_BACK_BYTES = 1 << 14  # for the time of a line that has none

# plog, torch_npu and ISO 8601; then vLLM, glog and c10d, which leave the year out; then dmesg -T.
_FULL = re.compile(
    rb"(\d{4})-(\d\d)-(\d\d)[-T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{3})(?:\.(\d{3}))?)?\d*"
    rb"(Z|[+-]\d\d:\d\d)?"
)
_SHORT = re.compile(
    rb"(?:(?:^|[\[ ])[IWEF](\d{1,2}?)(\d\d) |(?:INFO|WARNING|ERROR) (\d\d)-(\d\d) )"
    rb"(\d\d):(\d\d):(\d\d)(?:\.(\d{3}))?",
    re.MULTILINE,
)
_SYSLOG = re.compile(
    rb"(?:^|\[(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) )(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
    rb" +(\d{1,2}) (\d\d):(\d\d):(\d\d)(?: (\d{4})\])?",
    re.MULTILINE,
)
_MONTHS = {
    name: number
    for number, name in enumerate(
        (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun",
         b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"), 1
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stamp:
    """A time as a log gives it; the year may be missing. Without a zone it is the host's own.

    `is_to_second` tells that it may be any time of that second.
    """

    year: int | None
    rest: tuple[int, int, int, int, int, int]  # month, day, hour, minute, second, microsecond
    is_to_second: bool

    def at(self, year: int) -> datetime | None:
        """Return the time, in `year` if the log names none; None if no calendar has it."""
        try:
            return datetime(self.year or year, *self.rest)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a log. `stamp` is its own, or (`is_own` false) the last one before it.

    `words` are the numbers of those looked for that are in it.
    """

    number: int
    text: str
    words: tuple[int, ...]
    stamp: Stamp | None
    is_own: bool


def stamp_of(text: bytes, *, last: bool = False) -> Stamp | None:
    """Return the first time in `text`, or the last."""
    best: tuple[int, Stamp] | None = None
    for regex, read in ((_FULL, _full), (_SHORT, _short), (_SYSLOG, _syslog)):
        for match in regex.finditer(text):
            if best is None or (match.start() > best[0] if last else match.start() < best[0]):
                best = match.start(), read(match)
            if not last:
                break
    return best and best[1]


def _full(m: re.Match[bytes]) -> Stamp:
    year, *rest = (int(m[i]) for i in range(1, 7))
    micro = 1000 * int(m[7] or 0) + int(m[8] or 0)
    stamp = Stamp(year, (rest[0], rest[1], rest[2], rest[3], rest[4], micro), m[7] is None)
    if m[9] is None or (naive := stamp.at(year)) is None:
        return stamp
    zone = m[9].decode().replace("Z", "+00:00")
    local = datetime.fromisoformat(f"{naive.isoformat()}{zone}").astimezone()
    moved = (local.month, local.day, local.hour, local.minute, local.second, micro)
    return Stamp(local.year, moved, stamp.is_to_second)


def _short(m: re.Match[bytes]) -> Stamp:
    month, day = int(m[1] or m[3]), int(m[2] or m[4])
    rest = month, day, int(m[5]), int(m[6]), int(m[7]), 1000 * int(m[8] or 0)
    return Stamp(None, rest, m[8] is None)


def _syslog(m: re.Match[bytes]) -> Stamp:
    clock = int(m[3]), int(m[4]), int(m[5])
    return Stamp(int(m[6]) if m[6] else None, (_MONTHS[m[1]], int(m[2]), *clock, 0), True)


def lines_with(stream: BinaryIO, words: Sequence[bytes]) -> Iterator[Line]:
    """Yield the lines that have any of `words`; at most two chunks are in memory at a time.

    A line longer than a chunk is read in pieces, each of them a line.
    """
    number, rest, before = 1, b"", None
    while data := stream.read(CHUNK_BYTES):
        chunk = rest + data
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) < CHUNK_BYTES:
            rest = chunk
            continue
        chunk, rest = (chunk[:end], chunk[end:]) if end else (chunk, b"")
        yield from _of_chunk(chunk, number, words, before)
        before = stamp_of(chunk[-LOOK_BACK_BYTES:], last=True) or before
        number += chunk.count(b"\n")
    if rest:
        yield from _of_chunk(rest, number, words, before)


def _of_chunk(
    chunk: bytes, number: int, words: Sequence[bytes], before: Stamp | None
) -> Iterator[Line]:
    places: dict[int, tuple[int, list[int]]] = {}
    for i, word in enumerate(words):
        at = chunk.find(word)
        while at >= 0:
            end = chunk.find(b"\n", at)
            end = len(chunk) if end < 0 else end
            places.setdefault(chunk.rfind(b"\n", 0, at) + 1, (end, []))[1].append(i)
            at = chunk.find(word, end)
    counted = 0
    for start in sorted(places):
        number += chunk.count(b"\n", counted, start)
        counted = start
        end, found = places[start]
        raw = chunk[start : min(end, start + LINE_CHARS)]
        own = stamp_of(raw)
        if own is None:
            before = stamp_of(chunk[max(0, start - LOOK_BACK_BYTES) : start], last=True) or before
        text = raw.decode(errors="replace").strip()
        yield Line(number, text, tuple(found), own or before, own is not None)
