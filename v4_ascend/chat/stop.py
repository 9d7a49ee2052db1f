"""Stop strings in a stream."""

from __future__ import annotations

from collections.abc import Sequence

from v4_ascend.chat.held_back import HeldBack


class StopMatcher:
    """Cuts a stream of text before the first stop string, however the text is chunked."""

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held_back = HeldBack(stops)
        self._pending = ""
        self._stopped = False
        self.matched: str | None = None  # the stop string that ended it

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that can be sent, and whether a stop string has ended it."""
        if self._stopped:
            return "", True
        self._pending += text
        # The string that is complete first wins, as if the text came character by character.
        ends = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._pending.find(stop)) >= 0
        ]
        if ends:
            end, start = min(ends)
            self._stopped, self.matched = True, self._pending[start:end]
            return self._pending[:start], True
        emit, self._pending = self._held_back.split(self._pending)
        return emit, False

    def finish(self) -> str:
        """Return the text that was held back, as no more will follow."""
        emit = "" if self._stopped else self._pending
        self._pending = ""
        return emit
