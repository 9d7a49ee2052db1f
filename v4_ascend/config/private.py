"""Files of the user alone: plans with keys, links with secrets, logs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from v4_ascend.errors import ConfigError

MODE, FOLDER_MODE = 0o600, 0o700


def private_folder(folder: Path) -> None:
    """Make a folder that nobody else may enter; one that is there is closed to others.

    Raises:
        ConfigError: it is another user's, who could change what we write, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise ConfigError(
                str(folder),
                f"is of user {found.st_uid}, we are {os.geteuid()}; remove it, or give another "
                "XDG_STATE_HOME",
            )
        if found.st_mode & 0o077:
            folder.chmod(FOLDER_MODE)
    except OSError as e:
        raise ConfigError(str(folder), f"cannot be made: {e.strerror}") from e


def open_private(file: Path) -> BinaryIO:
    """Open a file to write from its beginning, readable by its owner alone.

    An old one is removed first: it may have other readers, or be a link to somewhere else.
    """
    file.unlink(missing_ok=True)
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE), "wb")


def private_opener(path: str, flags: int) -> int:
    """Open for `open(..., opener=)`: a file that is made is readable by its owner alone."""
    return os.open(path, flags, MODE)


def write_private(file: Path, text: str) -> None:
    """Write a file whole or not at all, readable by its owner alone."""
    half = file.with_name(f".{file.name}.{os.getpid()}")
    with open_private(half) as f:
        f.write(text.encode())
    half.replace(file)
