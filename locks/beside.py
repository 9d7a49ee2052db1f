"""Print constraints for an image that has packages already: theirs stay, the rest is the lock's.

An image's torch and torch_npu belong together, and vLLM pins what it was tried with. With these
constraints pip adds what is missing; where a package is too old for us it says so and ends.

    python beside.py cpu.txt > constraints.txt
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path


def normal(name: str) -> str:
    """Spell a package's name as the lock does."""
    return name.lower().replace("_", "-").replace(".", "-")


def constraints(lock: str, installed: dict[str, str]) -> list[str]:
    """Return a pin for torch if it is there, and for all that is locked."""
    has = {normal(name): version for name, version in installed.items()}
    pins = dict(line.split()[0].split("==") for line in lock.splitlines() if "==" in line)
    kept = {name: has[name] for name in ("torch", *pins) if name in has}
    return [f"{name}=={version}" for name, version in (pins | kept).items()]


if __name__ == "__main__":
    here = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    print("\n".join(constraints(Path(sys.argv[1]).read_text(encoding="utf-8"), here)))
