"""The typer app: commands come from their modules, heavy imports stay inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from v4_ascend import __version__
from v4_ascend.cli import (
    bench,
    checkpoint,
    conformance,
    convert,
    deploy,
    fit,
    operators,
    parity,
    plan,
    ranktable,
    shard,
)
from v4_ascend.errors import V4AscendError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench.register(app)
checkpoint.register(app)
conformance.register(app)
convert.register(app)
deploy.register(app)
operators.register(app)
parity.register(app)
plan.register(app)
fit.register(app)
ranktable.register(app)
shard.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"v4-ascend {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print and exit"),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Deploy DeepSeek-V4 on Ascend, and prove on any machine that it is the right model."""


def main() -> None:
    """Run the command; an error raised on purpose is one message on stderr, not a traceback."""
    try:
        app()
    except V4AscendError as e:
        if "--debug" in sys.argv:
            raise
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
