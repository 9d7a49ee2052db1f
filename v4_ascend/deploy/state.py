"""What is deployed: two folders for each deployment, in each one file that says who runs it.

One folder serves, the other is for what comes to replace it. Nothing says which is which but the
processes themselves: who is gone does not count, however it ended, so that no kill leaves a state
that has to be mended.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from v4_ascend.config.private import write_private

FILE = "supervisor.json"
LOCK = "lock"  # written by who starts: its time is that of the last start
OTHER = "@2"  # ends the second folder's name; no deployment's name has such a sign
Phase = Literal["starting", "serving", "ending"]
# Whom to ask first: who serves, or else who will, or did.
PHASES: tuple[Phase, ...] = ("serving", "starting", "ending")


def state_root() -> Path:
    """Return the folder of all deployments."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "v4-ascend"


def folders(name: str) -> tuple[Path, Path]:
    """Return both folders of a deployment."""
    root = state_root()
    return root / name, root / f"{name}{OTHER}"


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


@dataclass(frozen=True)
class Supervisor:
    """The process that runs a deployment; pid and start time together are never reused.

    `inside` is where its own front answers even while another has the address.
    """

    name: str
    pid: int
    started: int
    url: str
    digest: str
    model: str
    engine: str = "native"
    phase: Phase = "serving"
    inside: str | None = None
    version: str = ""
    folder: str = ""

    @classmethod
    def read(cls, folder: Path) -> Supervisor | None:
        """Read who runs, or ran, what is in a folder."""
        try:
            text = (folder / FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return replace(cls(**json.loads(text)), folder=str(folder))

    def is_running(self) -> bool:
        """Whether it still runs."""
        return start_time(self.pid) == self.started

    def write(self, folder: Path) -> None:
        """Write the file whole or not at all."""
        write_private(folder / FILE, json.dumps(asdict(self)))

    def forget(self) -> None:
        """Remove the file of one that is gone."""
        (Path(self.folder) / FILE).unlink(missing_ok=True)


def generations(name: str) -> list[Supervisor]:
    """Return who runs a deployment, first who serves it: two while one replaces the other."""
    found = [s for f in folders(name) if (s := Supervisor.read(f)) is not None and s.is_running()]
    return sorted(found, key=lambda s: (PHASES.index(s.phase), -s.started))


def lost(name: str) -> list[Supervisor]:
    """Return who ran a deployment and is gone without having ended it."""
    found = [Supervisor.read(f) for f in folders(name)]
    return [s for s in found if s is not None and not s.is_running()]


def find(name: str) -> Supervisor | None:
    """Return who serves a deployment, or else starts or ends it."""
    return next(iter(generations(name)), None)


def names() -> list[str]:
    """Return all deployments that run, or ran and were not ended."""
    found = {p.parent.name.removesuffix(OTHER) for p in state_root().glob(f"*/{FILE}")}
    return sorted(found)


def running() -> list[Supervisor]:
    """Return all running deployments, each by who serves it."""
    return [found for name in names() if (found := find(name))]


def vacant(name: str) -> Path:
    """Return the folder for the next start: one that nobody runs in.

    One whose supervisor was lost comes last: what he started may just be ending.
    """
    taken = {s.folder for s in generations(name)}
    free = [f for f in folders(name) if str(f) not in taken] or [folders(name)[1]]
    return next((f for f in free if not (f / FILE).exists()), free[0])


def latest(name: str) -> Path:
    """Return the folder of who serves, or else of the last start."""
    if (found := find(name)) is not None:
        return Path(found.folder)

    def started(folder: Path) -> float:
        lock = folder / LOCK
        return lock.stat().st_mtime if lock.exists() else 0.0

    return max(folders(name), key=started)
