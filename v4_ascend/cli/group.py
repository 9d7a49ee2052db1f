"""A group of commands, whose help is quick and whole."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class Group(TyperGroup):
    """Lists each command with the first sentence of its help, in as many lines as that takes.

    Typer cuts it at one line unless rich draws the help: that takes three times as long as all
    else, most of it imports.
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands into the formatter."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, c.get_short_help_str(limit=1000)) for name, c in commands.items() if c]
            )
