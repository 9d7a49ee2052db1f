"""The typer app: commands come from their modules, heavy imports stay inside the commands."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, cast

import typer

from v4_ascend import __version__
from v4_ascend.cli import (
    bench,
    checkpoint,
    conformance,
    convert,
    deploy,
    doctor,
    explain,
    fit,
    host,
    operators,
    parity,
    plan,
    ranktable,
    shard,
    support,
)
from v4_ascend.cli.group import Group
from v4_ascend.errors import ConfigError, V4AscendError

# click's UsageError: older typers take it from click, newer ones carry it with them.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench.register(app)
checkpoint.register(app)
conformance.register(app)
convert.register(app)
deploy.register(app)
doctor.register(app)
explain.register(app)
operators.register(app)
parity.register(app)
plan.register(app)
fit.register(app)
host.register(app)
ranktable.register(app)
shard.register(app)
support.register(app)


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


# Threads of one operator that are done sleep until the others are. Left to spin, they take the
# core from those where anything else runs on the machine: a step then lasts twenty times as long.
SLEEPING = ("OMP_WAIT_POLICY", "passive")


def main() -> None:
    """Run the command; what is wrong is one line on stderr, and no traceback."""
    os.environ.setdefault(*SLEEPING)  # before torch is loaded, and for the processes started here
    try:
        code = app(standalone_mode=False)
    except V4AscendError as e:
        if "--debug" in sys.argv:
            raise
        code = _say(str(e), e.exit_code)
    except _UsageError as e:
        code = _say(_misused(e), ConfigError.exit_code)
    except typer.Abort:
        code = _say("interrupted", V4AscendError.exit_code)
    sys.exit(code)


def _say(what: str, exit_code: int) -> int:
    if what:
        print(f"error: {what}", file=sys.stderr)
    return exit_code


def _misused(error: Any) -> str:
    said: str = error.format_message()
    if said.startswith("Usage: "):  # a group without a command: the help, and no error to name
        print(said, file=sys.stderr)
        return ""
    command = error.ctx.command_path if error.ctx else "v4-ascend"
    return f"{command}: {said.rstrip('.')}; see {command} -h"
