"""Backends: how each operator runs on one kind of device.

Importing a backend registers its kernels and needs no device and no vendor library;
running one does.
"""

from v4_ascend.backends.backend import Backend
from v4_ascend.backends.cpu import CPU

BACKENDS: tuple[Backend, ...] = (CPU,)

__all__ = ["BACKENDS", "Backend"]

if __name__ != "v4_ascend.backends":
    raise ImportError(f"import v4_ascend.backends, not {__name__}")
