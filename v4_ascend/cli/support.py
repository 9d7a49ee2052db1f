"""`support-bundle`: what others need to help, in one file, without secrets and addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("support-bundle")(support_command)


def support_command(
    out: Annotated[Path, typer.Option(help="the file to write, FILE.tar.gz")],
    name: Annotated[str | None, typer.Argument(help="a deployment")] = None,
    topology: Annotated[Path | None, typer.Option(help="its topology file, to pack too")] = None,
) -> None:
    """Pack versions, settings, plan, logs, flight record and explanation for support.

    Keys, tokens, passwords, addresses, host and user names are replaced by aliases.
    """
    from v4_ascend.cli.files import require_writable
    from v4_ascend.deploy.support.bundle import Wanted, write

    if not out.name.endswith(".tar.gz"):
        raise ConfigError("--out", f"{out} does not end in .tar.gz")
    if topology is not None and not topology.is_file():
        raise ConfigError("--topology", f"no file {topology}")
    require_writable("--out", out.parent)
    counts = write(Wanted(name, topology), out)
    said = ", ".join(f"{kind} {n}" for kind, n in counts.items()) or "nothing"
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; replaced: {said}; look before you send")
