"""The errors of many logs in the order of time, and which of them was first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import BinaryIO

from v4_ascend.deploy.explain.entries import Entry, all_entries
from v4_ascend.deploy.explain.places import Place, place_of
from v4_ascend.deploy.explain.reading import Line, Stamp, lines_with
from v4_ascend.supernode.plan import Plan

WRAPPED_SECONDS = 60.0  # how long after a wrapper its rank still tells what it wraps
MESSAGE_LINES = 40  # of its message, of which only the first names the rank
# Lines that look like errors without being known, and those that never are.
_LIKE_ERRORS = ("[ERROR]", " ERROR ", "Error: ", "error: ", "Exception: ", "error code")
_IS_ERROR = re.compile(
    r"\[ERROR\]|\bERROR \d\d-\d\d \d\d:|(?:^|[\s:\]])(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception): \S"
    r"|^(?:\[\d+\]: )?error: |function error: "
)
_IS_NEWS = re.compile(
    r"\[(?:INFO|DEBUG|EVENT)\]|(?:^|[\s)])(?:INFO|DEBUG)[: ]|^\S*\"event\": \"request\"|"
    r'^\{"time": "[^"]*", "event": "request"'
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The first of `count` lines that show one error on one rank; entry None: nobody knows it."""

    entry: Entry | None
    place: Place
    line: Line
    order: int  # of its file among those read
    at: datetime | None = None
    count: int = 1

    @property
    def sort_key(self) -> tuple[bool, datetime, int, int]:
        """Time first; where it is unknown, last, in the order of files and lines.

        Of two in one second the one that is known more exactly is first.
        """
        at = self.at or datetime.min
        if self.line.stamp is not None and self.line.stamp.is_to_second:
            at += timedelta(seconds=1)
        return self.at is None, at, self.order, self.line.number


_Key = tuple[str | None, tuple[str, int | None, int | None]]


class Findings:
    """Collects what logs show: one finding for each error of each rank, however long they are."""

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan
        self._entries = all_entries()
        stems = tuple(sorted({s for e in self._entries for s in e.stems} | set(_LIKE_ERRORS)))
        self._words = tuple(s.encode() for s in stems)
        # Of each word the entries it may stand for, by their numbers: the lowest is meant.
        self._of_word = tuple(
            tuple(i for i, e in enumerate(self._entries) if s in e.stems) for s in stems
        )
        self._first: dict[_Key, Finding] = {}
        self._counts: dict[_Key, int] = {}
        self._rank_of: dict[int, set[int]] = {}
        self._n_files = 0
        self.files_without_time: list[str] = []

    def read(self, file: str, stream: BinaryIO) -> None:
        """Look through one log."""
        had_time, n_found = False, 0
        for line in lines_with(stream, self._words):
            if _IS_NEWS.search(line.text):
                continue
            entry = self._entry_of(line)
            if entry is None and not _IS_ERROR.search(line.text):
                continue
            n_found += 1
            had_time = had_time or line.stamp is not None
            self._add(entry, place_of(line.text, file, self._plan), line)
        if n_found and not had_time:
            self.files_without_time.append(file)
        self._n_files += 1

    def _entry_of(self, line: Line) -> Entry | None:
        candidates = sorted({i for word in line.words for i in self._of_word[word]})
        shown = (self._entries[i] for i in candidates if self._entries[i].shows_in(line.text))
        return next(shown, None)

    def _add(self, entry: Entry | None, place: Place, line: Line) -> None:
        if place.rank is not None and place.pid is not None:
            self._rank_of.setdefault(place.pid, set()).add(place.rank)
        # Of a rank all processes are one; of processes without a rank each is one.
        who = (place.file, place.rank, place.pid if place.rank is None else None)
        key = (entry.id if entry else None, who)
        self._counts[key] = self._counts.get(key, 0) + 1
        if key not in self._first:
            self._first[key] = Finding(entry, place, line, self._n_files)

    def sorted(self) -> list[Finding]:
        """Return all findings in the order of time; a pid that one rank has names that rank."""
        years = [s.year for f in self._first.values() if (s := f.line.stamp) and s.year]
        year = max(years, default=datetime.now().year)
        out = []
        for key, f in self._first.items():
            place = f.place
            ranks = self._rank_of.get(place.pid or -1, set())
            if place.rank is None and len(ranks) == 1:
                place = replace(place, rank=next(iter(ranks)))
            at = _time(f.line.stamp, year)
            out.append(replace(f, place=place, at=at, count=self._counts[key]))
        return sorted(out, key=lambda f: f.sort_key)


def _time(stamp: Stamp | None, year: int) -> datetime | None:
    return stamp.at(year) if stamp is not None else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first error, and the rest; `first` is None where there is no error at all."""

    first: Finding | None
    rest: tuple[Finding, ...]
    only_consequences: bool = False

    @property
    def is_told_to_end(self) -> bool:
        """Whether signal 15 is all there is: `down` ends ranks so, and that is no fault."""
        found = [f for f in (self.first, *self.rest) if f is not None]
        return bool(found) and all(f.entry is not None and f.entry.id == "sigterm" for f in found)


def judge(findings: Sequence[Finding]) -> Verdict:
    """Choose the first error: one with a cause, else one nobody knows, else a consequence."""
    known = [f for f in findings if f.entry is not None]
    primary = [f for f in known if f.entry is not None and not f.entry.is_consequence]
    unknown = [f for f in findings if f.entry is None]
    if primary:
        first = _with_rank(_unwrapped(primary), known)
    elif unknown:
        first = unknown[0]
    elif known:
        first = known[0]
    else:
        return Verdict(None, ())
    rest = tuple(f for f in findings if (f.order, f.line) != (first.order, first.line))
    return Verdict(first, rest, only_consequences=not primary and not unknown)


def _unwrapped(primary: Sequence[Finding]) -> Finding:
    """Return the first, or what the same rank says soon after if the first only wraps that."""
    first = primary[0]
    if first.entry is None or not first.entry.is_wrapper:
        return first
    for f in primary:
        if f.entry is None or f.entry.is_wrapper or not _is_soon(first, f):
            continue
        is_same_rank = f.place.rank is not None and f.place.rank == first.place.rank
        if is_same_rank or (f.place.rank is None and _goes_on(first, f)):
            return f
    return first


def _goes_on(start: Finding, f: Finding) -> bool:
    """Whether a line without a rank is of the message that another one begins."""
    return f.order == start.order and 0 < f.line.number - start.line.number <= MESSAGE_LINES


def _with_rank(first: Finding, findings: Sequence[Finding]) -> Finding:
    """Give a line without a rank that of the wrapper whose message it is in."""
    if first.place.rank is not None:
        return first
    starts = [f for f in findings if f.entry and f.entry.is_wrapper and _goes_on(f, first)]
    start = max(starts, key=lambda f: f.line.number, default=first)
    return replace(first, place=start.place)


def _is_soon(first: Finding, f: Finding) -> bool:
    if f.at is None or first.at is None:
        return True
    return (f.at - first.at).total_seconds() <= WRAPPED_SECONDS


def ranks_heard(findings: Iterable[Finding]) -> set[int]:
    """Return the ranks that report anything."""
    return {f.place.rank for f in findings if f.place.rank is not None}
