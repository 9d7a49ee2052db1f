"""docker and kubectl, as `deploy`, `status` and `down` use them: by lists of words, no shell."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from v4_ascend.errors import BackendUnavailableError, DeployError

COMMAND_SECONDS = 120.0


@dataclass(frozen=True)
class Container:
    """A pod or a container: what it is called, where it runs, and how it is.

    `trouble` is why it will not become ready by itself.
    """

    name: str
    host: str
    state: str
    is_ready: bool
    trouble: str = ""


class Orchestrator(Protocol):
    """Who runs the containers of one deployment."""

    def up(self) -> None:
        """Give it the files that are kept."""

    def containers(self) -> list[Container]:
        """Return what runs of it, the first host's first."""

    def down(self) -> None:
        """Take all of it back, and nothing else."""

    def logs(self) -> str:
        """Return what is to be typed to see the first host's logs."""


def run(words: Sequence[str], stdin: bytes | None = None) -> str:
    """Run a command and return what it printed.

    Raises:
        BackendUnavailableError: it is not installed.
        DeployError: it failed or did not end; with the last line it said.
    """
    if shutil.which(words[0]) is None:
        raise BackendUnavailableError(
            f"{words[0]}: no such command on PATH; install it, or write the files with "
            "deploy --dry-run --out DIR and take them where it is"
        )
    shown = " ".join(words[:6])
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise DeployError(f"{shown}: did not end in {e.timeout:g} s") from e
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise DeployError(f"{shown}: exit code {done.returncode}, saying: {said[-1]}")
    return done.stdout.decode(errors="replace")
