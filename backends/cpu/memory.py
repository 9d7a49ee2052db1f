"""What glibc does with memory that a step gives back: the next one asks for it again."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
TUNED_BY = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let the process keep freed memory, whatever its size, unless the environment tunes malloc.

    As it comes, glibc returns large pieces to the system at once, and every page of the next step's
    tensors must be mapped and zeroed again. Elsewhere (musl) nothing is changed.

    Source: mallopt(3).
    """
    if any(name.startswith(TUNED_BY) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)


def give_back_freed_memory() -> None:
    """Give the system what is free now: what reading a model took is not what its steps take.

    Source: malloc_trim(3).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
