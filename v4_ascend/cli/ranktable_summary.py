"""What `ranktable` says of a table, as data and as text."""

from __future__ import annotations

from pathlib import Path

import typer

from v4_ascend.supernode.ranktable.file import table_json, write_table
from v4_ascend.supernode.ranktable.model import RankTable


def put(table: RankTable, out: Path | None) -> None:
    """Write a table to a file, or to stdout."""
    if out is None:
        typer.echo(table_json(table), nl=False)
    else:
        write_table(table, out)
        typer.echo(f"{out}: {summary(table)}")


def facts(table: RankTable) -> dict[str, object]:
    """Return what `validate --json` reports as data."""
    return {
        "version": table.version,
        "status": table.status,
        "hosts": len(table.hosts),
        "devices": len(table.devices),
        "supernodes": list(table.supernodes),
    }


def summary(table: RankTable) -> str:
    """Say in a line what a table has."""
    counts = [("host", len(table.hosts)), ("device", len(table.devices))]
    counts += [("supernode", n)] if (n := len(table.supernodes)) else []
    spelled = ", ".join(f"{n} {noun}{'s' if n > 1 else ''}" for noun, n in counts)
    return f"rank table {table.version}, {table.status}: {spelled}"
