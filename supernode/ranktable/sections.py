"""A dump cut into sections: the line of a command, then what it printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, NoReturn

from v4_ascend.errors import ConfigError

_COMMAND = re.compile(r"\s*(?:[$#+]+ +)?(?:\S*/)?((?:npu-smi|hccn_tool) .*)")
_OTHER_COMMAND = re.compile(r"[$+]+ +\S")


class Line(NamedTuple):
    """A line of the file, counted from 1."""

    number: int
    text: str


@dataclass(frozen=True)
class Section:
    """One command and its output."""

    file: str
    start: int
    words: tuple[str, ...]
    lines: tuple[Line, ...]

    def asks(self, *words: str) -> bool:
        """Whether the command has these words, in any order after its name."""
        return self.words[0] == words[0] and set(words) <= set(self.words)

    def refuse(self, what: str, where: Line | int | None = None) -> NoReturn:
        """Raise ConfigError at a line, or at the command."""
        line = where.number if isinstance(where, Line) else where or self.start
        raise ConfigError(f"{self.file}:{line}", f"`{' '.join(self.words)}`: {what}")

    def option(self, name: str) -> int:
        """Return the number after an option of the command."""
        after = self.words[self.words.index(name) + 1 :] if name in self.words else ()
        if not after or not (after[0].isascii() and after[0].isdigit()):
            self.refuse(f"must have {name} with a number")
        return int(after[0])

    def filled(self) -> list[Line]:
        """Return the lines that are not blank; there must be some."""
        lines = [x for x in self.lines if x.text.strip()]
        if not lines:
            self.refuse("printed nothing; is it cut?")
        return lines

    def pairs(self, required: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Read lines of ``key : value`` as value and line."""
        found: dict[str, tuple[str, int]] = {}
        for line in self.filled():
            key, colon, value = (part.strip() for part in line.text.partition(":"))
            if not colon or not value:
                self.refuse(f"must print key: value, got {line.text.strip()!r}", line)
            if key in found:
                self.refuse(f"{key!r} comes a second time; is this mixed?", line)
            found[key] = (value, line.number)
        if missing := [k for k in required if k not in found]:
            self.refuse(f"must print {missing[0]!r}; is it cut?")
        return found

    def table(self, required: Sequence[str]) -> list[tuple[Line, dict[str, str]]]:
        """Read a table framed by ``+---+`` lines above, below its header and at its end."""
        lines = self.filled()
        frames = [i for i, x in enumerate(lines) if re.fullmatch(r"[+-]+", x.text.strip())]
        if frames != [0, 2, len(lines) - 1]:
            self.refuse("must be a table with a frame; is it cut?", lines[-1])
        columns = _cells(lines[1])
        if missing := [c for c in required if c not in columns]:
            self.refuse(f"must have a column {missing[0]!r}, has {columns}", lines[1])
        rows = []
        for line in lines[3:-1]:
            cells = _cells(line)
            if len(cells) != len(columns):
                self.refuse(f"must have {len(columns)} columns, got {line.text.strip()!r}", line)
            rows.append((line, dict(zip(columns, cells, strict=True))))
        return rows


def _cells(line: Line) -> list[str]:
    return [c.strip() for c in line.text.strip().strip("|").split("|")]


def sections_of(text: str, file: str) -> list[Section]:
    """Cut a dump at the lines that are commands."""
    lines = [Line(n, x) for n, x in enumerate(text.splitlines(), start=1)]
    starts = [i for i, x in enumerate(lines) if _is_command(x.text)]
    sections = []
    for start, end in pairwise([*starts, len(lines)]):
        line = lines[start]
        if command := _COMMAND.fullmatch(line.text):
            words = _words(command.group(1), file, line.number)
            sections.append(Section(file, line.number, words, tuple(lines[start + 1 : end])))
    return sections


def _is_command(text: str) -> bool:
    return bool(_COMMAND.fullmatch(text) or _OTHER_COMMAND.match(text))


def _words(command: str, file: str, number: int) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(command))
    except ValueError as e:
        raise ConfigError(f"{file}:{number}", f"is no command: {e}") from e
