"""The logs a user names: files, folders, standard input, or those of a deployment."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from v4_ascend.deploy.explain.findings import Findings
from v4_ascend.deploy.state import latest
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.plan import Plan

# What a code looks like, known or not: all the vendors' do. A file has a suffix or a folder.
CODE = re.compile(r"[\w-]+")


def looks_like_code(word: str) -> bool:
    """Whether a word that names no file is meant as an error code."""
    return CODE.fullmatch(word) is not None


def of_deployment(name: str) -> tuple[list[Path], Plan | None]:
    """Return a deployment's logs, flight record included, and its plan if it ever had one.

    Raises:
        ConfigError: there are no logs of that name.
    """
    folder = latest(name)
    logs = sorted(folder.glob("*.log"))
    if not logs:
        raise ConfigError("--name", f"{name} has no logs in {folder}; v4-ascend status lists names")
    plan = folder / "plan.json"
    return logs, Plan.read(plan) if plan.exists() else None


def look_through(names: Sequence[str | Path], plan: Plan | None) -> Findings:
    """Read logs; a folder stands for every ``*.log`` in it, ``-`` for standard input.

    Raises:
        ConfigError: a file is not there or cannot be read, a folder has no logs.
    """
    findings = Findings(plan)
    for name in names:
        if name == "-":
            findings.read("standard input", sys.stdin.buffer)
            continue
        path = Path(name)
        files = sorted(path.rglob("*.log")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(str(path), "a folder without *.log")
        for file in files:
            try:
                with file.open("rb") as stream:
                    findings.read(str(file), stream)
            except OSError as e:
                raise ConfigError(str(file), f"cannot be read: {e.strerror}") from e
    return findings
