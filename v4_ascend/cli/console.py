"""The console that tables are printed on."""

from __future__ import annotations

from rich.console import Console

PIPE_WIDTH = 160


def new_console() -> Console:
    """Return a console that is as wide as a pipe needs."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = PIPE_WIDTH  # nobody's window: nothing need be cut
    return console
