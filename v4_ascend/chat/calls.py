"""Tool calls written as they arrive: the deltas of one completion's calls."""

from __future__ import annotations

from v4_ascend.chat.deltas import ArgumentsDelta, Delta, ToolCallDelta
from v4_ascend.chat.dsml import json_or_text, new_call_id
from v4_ascend.chat.strings import to_json


class CallWriter:
    """Turns calls, parameters and values into deltas; the arguments of a call become one object.

    Read but not written are a call without a name, a parameter without one or with one already
    used, and, if not `report`, everything.
    """

    def __init__(self, *, report: bool) -> None:
        self._report = report
        self._n_calls = 0
        self._is_open = False
        self._index: int | None = None  # of the open call, if it is written
        self._keys: set[str] = set()
        self._opening: str | None = None  # what precedes the open value, if it is written
        self._is_text = False
        self._held: list[str] = []  # of a value that may be JSON: known once it is complete

    @property
    def is_open(self) -> bool:
        """Whether a call has begun and not ended."""
        return self._is_open

    def begin(self, name: str | None) -> list[Delta]:
        """Begin a call of the function `name`."""
        self._is_open = True
        self._keys = set()
        self._index = None
        if not (name and self._report):
            return []
        self._index = self._n_calls
        self._n_calls += 1
        return [ToolCallDelta(self._index, new_call_id(), name)]

    def end(self) -> list[Delta]:
        """End the open call, if any, and the value that may be open in it."""
        if not self._is_open:
            return []
        self._is_open = False
        return [*self.end_value(), *self._write("}" if self._keys else "{}")]

    def begin_value(self, key: str | None, *, is_text: bool) -> list[Delta]:
        """Begin the value of parameter `key`: text, or what is JSON if it can be."""
        self._is_text = is_text
        self._held = []
        self._opening = None
        if not key or key in self._keys:
            return []
        self._opening = f"{', ' if self._keys else '{'}{to_json(key)}: "
        self._keys.add(key)
        return self._write(f'{self._opening}"') if is_text else []

    def value(self, text: str) -> list[Delta]:
        """Continue the open value."""
        if self._opening is None or not text:
            return []
        if self._is_text:
            return self._write(to_json(text)[1:-1])
        self._held.append(text)
        return []

    def end_value(self) -> list[Delta]:
        """End the open value, if any."""
        opening, self._opening = self._opening, None
        if opening is None:
            return []
        return self._write('"' if self._is_text else opening + json_or_text("".join(self._held)))

    def cut_value(self, text: str) -> list[Delta]:
        """Write what there is of a value that will never be complete."""
        deltas = self.value(text)
        if self._opening is not None and not self._is_text:
            deltas += self._write(self._opening + "".join(self._held))
        return deltas

    def _write(self, text: str) -> list[Delta]:
        return [] if self._index is None else [ArgumentsDelta(self._index, text)]
