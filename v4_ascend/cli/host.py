"""`host`: one host of a deployment, started by itself in a pod or a container."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.errors import ConfigError

PORT = 29400


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("host")(host_command)


def host_command(
    plan: Annotated[Path, typer.Option(help="what deploy --dry-run prints")],
    index: Annotated[int, typer.Option(min=0, help="which host of the plan this is")] = 0,
    other: Annotated[
        int | None, typer.Option(min=0, help="instead: which of all but the first one")
    ] = None,
    first: Annotated[
        str | None, typer.Option(help="name or address of the first host, for the others")
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="where the first host is called")
    ] = PORT,
    secret: Annotated[
        Path | None, typer.Option(help="a file that all hosts have and nobody else")
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds until it must be ready")] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="seconds that running requests have to end when stopped")
    ] = 30.0,
) -> None:
    """Run one host of a plan, where nobody starts it by ssh: in a pod or a container.

    The first host (index 0) serves the API and waits for the others; they look for it. Each ends
    when another is lost, so that all can be started again; SIGTERM lets running requests end.
    """
    from v4_ascend.deploy.pod import FirstHost, OtherHost
    from v4_ascend.deploy.rollcall import read_secret
    from v4_ascend.deploy.torchrun import hosts_of
    from v4_ascend.supernode.plan import Plan

    index = index if other is None else 1 + other
    found = Plan.read(plan)
    hosts = hosts_of(found)
    if index >= len(hosts):
        raise ConfigError("--index", f"{index}; {plan} has hosts 0 to {len(hosts) - 1}")
    if len(hosts) > 1 and secret is None:
        raise ConfigError("--secret", f"missing; the {len(hosts)} hosts of {plan} share one")
    shared = read_secret(secret) if secret is not None and len(hosts) > 1 else None
    if index and first is None:
        raise ConfigError("--first", f"missing; host {index} looks for the first one")
    if not found.emulated:
        from v4_ascend.backends import find_backend

        find_backend(found.backend, str(plan)).require()

    def report(line: str) -> None:
        typer.echo(f"{found.name}: {line}", err=True)

    if first is None or shared is None or index == 0:
        FirstHost(found, report, drain_timeout, port, shared).run(timeout)
    else:
        OtherHost(found, index, first, port, shared, report, drain_timeout).run(timeout)
