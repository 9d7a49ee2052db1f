"""Progress of long work: a bar on a terminal, a line per 10 % elsewhere."""

from __future__ import annotations

import sys
import time
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


@contextmanager
def byte_reporter(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that takes bytes done and in all; bytes per second are told too."""
    if not sys.stderr.isatty():
        yield _lines(what, bytes_since=time.monotonic())
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(what: str, bytes_since: float | None = None) -> Callable[[int, int], None]:
    printed = 0

    def report(done: int, total: int) -> None:
        nonlocal printed
        tenth = done * 10 // total if total else 10
        if tenth > printed:
            printed = tenth
            rate = ""
            if bytes_since is not None:
                rate = f", {done / 1e6 / max(1e-9, time.monotonic() - bytes_since):,.0f} MB/s"
            print(f"{what}: {tenth * 10} %{rate}", file=sys.stderr, flush=True)

    return report
