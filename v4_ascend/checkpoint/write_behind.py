"""Having the disk write what a file has got so far while more of it is made."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

BEHIND_BYTES = 32 << 20  # handed to the disk at a time
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: start writing, wait for nothing


def _start_writing() -> Callable[[int, int, int, int], int] | None:
    found: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux alone has it
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


_start = _start_writing()


class WriteBehind:
    """Keeps the disk busy behind the writer of one file, so that its fsync finds little to do.

    By itself the kernel lets hundreds of megabytes gather, and the disk would be idle until then.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._new = fd, 0

    def wrote(self, nbytes: int) -> None:
        """Note that so many bytes were given to the kernel."""
        self._new += nbytes
        if self._new >= BEHIND_BYTES and _start is not None:
            self._new = 0
            # Whatever it answers, fsync waits for all of it and says what failed.
            _start(self._fd, 0, 0, _SYNC_FILE_RANGE_WRITE)
