"""Walk a JSON document by a description of its keys, and collect everything that is wrong."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from v4_ascend.config.load import did_you_mean
from v4_ascend.errors import RankTableError

MAX_SHOWN = 60  # characters of a value in a message


class Key(NamedTuple):
    """What a key holds: `read` returns the value, or raises ValueError with what it must be."""

    read: Callable[[Any], Any]
    is_required: bool = True


class JsonObject(dict[str, Any]):
    """An object as the parser met it: a plain dict would forget that a key came twice."""

    repeated: tuple[str, ...] = ()

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> JsonObject:
        """Build one from a parser's pairs."""
        made = cls(pairs)
        keys = [k for k, _ in pairs]
        made.repeated = tuple(dict.fromkeys(k for k in keys if keys.count(k) > 1))
        return made


@dataclass(frozen=True)
class Entry:
    """The sound values of one object and its place in the document."""

    where: str
    values: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] | None = None  # the keys it has; None where it is no object

    def lacks(self, key: str) -> bool:
        """Whether a key is absent, not merely refused."""
        return self.given is not None and key not in self.given

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def at(self, key: str) -> str:
        """Return the place of a key."""
        return f"{self.where}.{key}".removeprefix(".")


class Findings:
    """The problems of one document, in the order they are met."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._first: dict[Hashable, tuple[Hashable, str]] = {}

    def add(self, where: str, what: str) -> None:
        """Note a problem."""
        self.problems.append(f"{where}: {what}" if where else what)

    def require_none(self, file: str) -> None:
        """Raise RankTableError if there was any problem."""
        if self.problems:
            raise RankTableError(file, self.problems)

    def once(
        self,
        what: str,
        value: Hashable,
        where: str,
        *,
        scope: Hashable = None,
        owner: Hashable = None,
    ) -> None:
        """Note a value that `scope` has already, unless the same owner gave it."""
        mine = (owner or where, where)
        first_owner, first = self._first.setdefault((what, value, scope), mine)
        if first_owner != mine[0]:
            self.add(where, f"{what} {show(value)} is at {first} too; it must be unique")

    def entry(self, value: Any, where: str, keys: Mapping[str, Key]) -> Entry:
        """Read one object; what is wrong is noted and left out."""
        if not isinstance(value, dict):
            self.add(where, f"must be an object, got {show(value)}")
            return Entry(where)
        values: dict[str, Any] = {}
        entry = Entry(where, values, frozenset(value))
        for key in getattr(value, "repeated", ()):
            self.add(entry.at(key), "is given twice; give it once")
        for key, given in value.items():
            if key not in keys:
                self.add(where, f"unknown key {show(key)}{did_you_mean(key, keys)}")
                continue
            try:
                values[key] = keys[key].read(given)
            except ValueError as e:
                self.add(entry.at(key), f"must be {e}, got {show(given)}")
        for key, (_, is_required) in keys.items():
            if is_required and key not in value:
                self.add(where, f"{show(key)} is missing; it is required")
        return entry

    def entries(self, parent: Entry, key: str, keys: Mapping[str, Key]) -> list[Entry]:
        """Read the objects of a list that `parent` holds."""
        values = parent[key] or ()
        return [self.entry(v, f"{parent.at(key)}[{i}]", keys) for i, v in enumerate(values)]


def show(value: Any) -> str:
    """Spell a value as JSON does, so that "0" and 0 differ; cut what is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def text_of(longest: int) -> Callable[[Any], str]:
    """Read a string of 1 to `longest` characters."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= longest:
            raise ValueError(f"a string of 1 to {longest} characters")
        return value

    return read


def digits(low: int, high: int) -> Callable[[Any], int]:
    """Read a number that is spelled as a string: versions 1.x."""

    def read(value: Any) -> int:
        is_number = isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,9}", value)
        if not is_number or not low <= int(value) <= high:
            raise ValueError(f"a string of digits, from {show(str(low))} to {show(str(high))}")
        return int(value)

    return read


def integer(low: int, high: int) -> Callable[[Any], int]:
    """Read a number that is one: version 2.0."""

    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return read


def ip(*versions: int) -> Callable[[Any], str]:
    """Read an IP address one interface can have."""
    wanted = " or ".join(f"IPv{v}" for v in versions)

    def read(value: Any) -> str:
        try:
            found = ipaddress.ip_address(value if isinstance(value, str) else "")
        except ValueError:
            found = None
        # An address with a zone ("%eth0") means nothing on another host.
        if found is None or found.version not in versions or "%" in value:
            raise ValueError(f"an {wanted} address")
        if found.is_unspecified or found.is_multicast:
            raise ValueError(f"an {wanted} address of one interface")
        return str(value)

    return read


def one_of(*words: str) -> Callable[[Any], str]:
    """Read one of a few words."""

    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(" or ".join(map(show, words)))
        return str(value)

    return read


def non_empty_list(value: Any) -> list[Any]:
    """Read a list that has entries."""
    if not isinstance(value, list) or not value:
        raise ValueError("a list with at least one entry")
    return value
