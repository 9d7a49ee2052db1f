"""How much of a stream must wait, because a string we look for may have begun."""

from __future__ import annotations

from collections.abc import Iterable


class HeldBack:
    """Splits a text before an end that may be the beginning of one of `strings`."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._beginnings = {s[:length] for s in strings for length in range(1, len(s))}
        self._longest = max(map(len, self._beginnings), default=0)

    def split(self, text: str) -> tuple[str, str]:
        """Return what can be sent now, and the longest end that must wait for more text."""
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return text[:-length], text[-length:]
        return text, ""
