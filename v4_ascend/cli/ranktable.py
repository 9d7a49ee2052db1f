"""`ranktable`: the file that tells HCCL which rank is which device, and its addresses."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.cli.group import Group
from v4_ascend.errors import ConfigError, RankTableError


class Version(StrEnum):
    """Which format."""

    v1_0 = "1.0"
    v1_2 = "1.2"
    v2_0 = "2.0"


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    group = typer.Typer(cls=Group, help="Rank tables of HCCL.", no_args_is_help=True)
    group.command("generate")(generate_command)
    group.command("validate")(validate_command)
    group.command("convert")(convert_command)
    app.add_typer(group, name="ranktable")


def generate_command(
    topology: Annotated[str, typer.Option(help="a file, or a bundled name such as supernode")],
    dumps: Annotated[Path | None, typer.Option(help="folder of HOST.txt and HOST.json")] = None,
    placeholder: Annotated[
        bool, typer.Option("--placeholder", help="addresses for planning; HCCL refuses the table")
    ] = False,
    version: Annotated[Version | None, typer.Option(help="default: what the SoC reads")] = None,
    out: Annotated[Path | None, typer.Option(help="default: stdout")] = None,
) -> None:
    """Write the rank table of a topology, from what its hosts say of themselves."""
    from v4_ascend.cli.ranktable_summary import put
    from v4_ascend.config.devices import device_profile
    from v4_ascend.config.topology import load_topology
    from v4_ascend.supernode.ranktable.generation import (
        generate,
        hosts_from_folder,
        placeholder_hosts,
        version_for,
    )

    if (dumps is None) == (not placeholder):
        raise ConfigError(
            "ranktable generate",
            "addresses are never made up; give --dumps DIR with HOST.txt or HOST.json of each "
            "host, or --placeholder for a table to plan with, and not both",
        )
    cluster = (found := load_topology(topology)).cluster
    profile = device_profile(cluster.device, found.where("cluster.device"))
    of = version_for(profile) if version is None else version.value
    if dumps is not None:
        hosts = hosts_from_folder(cluster.supernodes, dumps, found.where("cluster.supernodes"))
        put(generate(hosts, of), out)
    else:
        put(generate(placeholder_hosts(cluster.supernodes, of), of, "planned"), out)


def validate_command(
    file: Annotated[Path, typer.Argument(help="a rank table")],
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Check a rank table against every rule of its version; exit 2 with what is wrong."""
    from v4_ascend.cli.ranktable_summary import facts, summary
    from v4_ascend.supernode.ranktable.file import read_table

    try:
        table = read_table(file)
    except ConfigError as e:
        if not as_json:
            raise
        problems = e.problems if isinstance(e, RankTableError) else (str(e),)
        _echo_json(None, problems)
        raise typer.Exit(e.exit_code) from e
    if as_json:
        _echo_json(facts(table), ())
    else:
        typer.echo(f"{file}: {summary(table)}")


def convert_command(
    file: Annotated[Path, typer.Argument(help="a rank table")],
    to: Annotated[Version, typer.Option("--to", help="the version wanted")],
    out: Annotated[Path | None, typer.Option(help="default: stdout")] = None,
) -> None:
    """Write a rank table in another version; say what is lost, refuse where facts are missing."""
    from v4_ascend.cli.ranktable_summary import put
    from v4_ascend.supernode.ranktable.conversion import convert
    from v4_ascend.supernode.ranktable.file import read_table

    table, lost = convert(read_table(file, allow_planned=True), to.value, str(file))
    for fact in lost:
        typer.echo(f"note: version {to.value} has no key for {fact}", err=True)
    put(table, out)


def _echo_json(data: dict[str, object] | None, problems: tuple[str, ...]) -> None:
    status = "error" if problems else "ok"
    out = {"version": 1, "status": status, "data": data, "diagnostics": problems}
    typer.echo(json.dumps(out))
