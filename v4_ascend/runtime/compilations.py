"""Kernels compiled while a rank serves: each holds up a step, for seconds at times."""

from __future__ import annotations

import sys


class Compilations:
    """Counts and names what is compiled after a rank has warmed up and said it is ready."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.n = 0

    def add(self, kernel: str) -> None:
        """Count a kernel, and name it in the rank's log."""
        self.n += 1
        sys.stderr.write(f"rank {self._rank}: compiled while serving: {kernel}\n")
