"""Where a command may write, asked before the work and not after it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from v4_ascend.errors import ConfigError


def require_writable(option: str, folder: Path, *, make: bool = False) -> None:
    """Refuse a folder in which no file can be made; with `make`, make the folder first.

    Raises:
        ConfigError: it is no folder, or nothing can be written there; `option` named it.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise ConfigError(option, f"no folder {folder}")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ConfigError(option, f"cannot write to {folder}: {e.strerror}") from e
