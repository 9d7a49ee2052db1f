"""Bundled model configurations by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from v4_ascend.errors import ConfigError


def preset_path(name: str) -> Path:
    """Return the ``config.json`` of a bundled model.

    Raises:
        ConfigError: no such preset; the message lists them.
    """
    folder = Path(str(files("v4_ascend.configs") / "models"))
    known = sorted(p.stem for p in folder.glob("*.json"))
    if name not in known:
        raise ConfigError("--preset", f"no preset {name!r}; there are {', '.join(known)}")
    return folder / f"{name}.json"
