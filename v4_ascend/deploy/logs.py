"""Log lines of a deployment, each with the process that wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from v4_ascend.deploy.torchrun import hosts_of
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.plan import Plan

FROM_RANK = re.compile(r"^\[(\d+)\]: ?(.*)$")  # torchrun's prefix, see `torchrun`


def lines_of(folder: Path, name: str, rank: int | None = None) -> Iterator[str]:
    """Yield the lines of all processes, or of one rank.

    Raises:
        ConfigError: there are no logs, or no such rank.
    """
    files = sorted(folder.glob("*.log"))
    if not files:
        raise ConfigError(name, "no logs; v4-ascend status lists what runs")
    plan = Plan.read(folder / "plan.json")
    if rank is not None and not 0 <= rank < len(plan.ranks):
        raise ConfigError("--rank", f"{rank}; {name} has ranks 0 to {len(plan.ranks) - 1}")
    hosts = hosts_of(plan)
    for file in files:
        kind, _, host = file.stem.partition("-")
        of_host = [r.rank for r in plan.ranks if r.host == (host or hosts[0])]
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            match = FROM_RANK.match(line) if kind == "ranks" else None
            if match is None:
                writer, text = file.stem, line
            else:
                writer, text = f"rank {of_host[int(match[1])]}", match[2]
            if rank is None or writer == f"rank {rank}":
                yield f"{writer}: {text}"
