"""What is deployed: one folder per deployment, one file that says who runs it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from v4_ascend.config.private import write_private


def state_root() -> Path:
    """Return the folder of all deployments."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "v4-ascend"


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
    """The process that runs a deployment; pid and start time together are never reused."""

    name: str
    pid: int
    started: int
    url: str
    digest: str
    model: str
    engine: str = "native"

    def is_running(self) -> bool:
        """Whether it still runs."""
        return start_time(self.pid) == self.started

    def write(self, folder: Path) -> None:
        """Write the file whole or not at all."""
        write_private(folder / "supervisor.json", json.dumps(asdict(self)))


def find(name: str) -> Supervisor | None:
    """Return the running supervisor of a deployment."""
    file = state_root() / name / "supervisor.json"
    if not file.exists():
        return None
    found = Supervisor(**json.loads(file.read_text(encoding="utf-8")))
    return found if found.is_running() else None


def running() -> list[Supervisor]:
    """Return all running deployments."""
    names = sorted(p.parent.name for p in state_root().glob("*/supervisor.json"))
    return [found for name in names if (found := find(name))]
