"""Bundled model configurations by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from v4_ascend.errors import ConfigError


def preset_names() -> tuple[str, ...]:
    """Return the names of all bundled models."""
    return tuple(sorted(p.stem for p in _folder().glob("*.json")))


def preset_path(name: str) -> Path:
    """Return the ``config.json`` of a bundled model.

    Raises:
        ConfigError: no such preset; the message lists them.
    """
    known = preset_names()
    if name not in known:
        raise ConfigError("--preset", f"no preset {name!r}; there are {', '.join(known)}")
    return _folder() / f"{name}.json"


def _folder() -> Path:
    return Path(str(files("v4_ascend.configs") / "models"))
