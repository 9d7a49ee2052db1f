"""Progress of long work: a bar on a terminal, a line per 10 % elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def reporter(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that takes what is done and what there is in all; logs to stderr."""
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(what: str) -> Callable[[int, int], None]:
    printed = 0

    def report(done: int, total: int) -> None:
        nonlocal printed
        tenth = done * 10 // total if total else 10
        if tenth > printed:
            printed = tenth
            print(f"{what}: {tenth * 10} %", file=sys.stderr, flush=True)

    return report
