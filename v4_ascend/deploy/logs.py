"""Log lines of a deployment, each with the process that wrote it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from v4_ascend.deploy.state import find, latest
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.plan import Plan, Rank

FROM_RANK = re.compile(r"^\[(\d+)\]: ?(.*)$")  # torchrun's prefix, see `torchrun`
POLL_SECONDS = 0.2


class Logs:
    """The logs of all processes of a deployment, or of one rank; each line is given once."""

    def __init__(self, name: str, rank: int | None = None) -> None:
        """Find them.

        Raises:
            ConfigError: there are no logs, or no such rank.
        """
        self._name, self._rank = name, rank
        self._folder = latest(name)
        self._read: dict[Path, int] = {}
        if not any(self._folder.glob("*.log")):
            raise ConfigError(name, "no logs; v4-ascend status lists what runs")
        self._ranks = self._planned()
        n_ranks = len(self._ranks)
        if rank is not None and not self._ranks:
            raise ConfigError("--rank", f"{rank}; {name} has not started any")
        if rank is not None and not 0 <= rank < n_ranks:
            raise ConfigError("--rank", f"{rank}; {name} has ranks 0 to {n_ranks - 1}")

    def lines(self) -> Iterator[str]:
        """Yield what has been written since the last call."""
        for file in sorted(self._folder.glob("*.log")):
            kind, _, host = file.stem.partition("-")
            ranks = self._of_host(host) if kind == "ranks" else []
            for line in self._new(file):
                match = FROM_RANK.match(line) if ranks else None
                writer = f"rank {ranks[int(match[1])]}" if match else file.stem
                if self._rank is None or writer == f"rank {self._rank}":
                    yield f"{writer}: {match[2] if match else line}"

    def follow(self) -> Iterator[str]:
        """Yield lines as they are written, until the deployment ends."""
        while True:
            found = find(self._name)
            yield from self.lines()
            if found is None:
                return
            if (folder := Path(found.folder)) != self._folder:  # another has taken its place
                self._folder, self._ranks = folder, self._planned()
            time.sleep(POLL_SECONDS)

    def _planned(self) -> tuple[Rank, ...]:
        file = self._folder / "plan.json"  # not there if nothing was ever started
        return Plan.read(file).ranks if file.exists() else ()

    def _of_host(self, host: str) -> list[int]:
        name = host or self._ranks[0].host
        return [r.rank for r in self._ranks if r.host == name]

    def _new(self, file: Path) -> list[str]:
        """Return the file's new whole lines; a file that is shorter than it was is a new one."""
        start = self._read.get(file, 0)
        with file.open("rb") as f:
            if f.seek(0, 2) < start:
                start = 0
            f.seek(start)
            data = f.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read[file] = start + len(whole)
        return whole.decode(errors="replace").splitlines()
