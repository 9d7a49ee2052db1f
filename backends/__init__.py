"""Backends: how each operator runs on one kind of device.

Importing a backend registers its kernels and needs no device and no vendor library;
running one does.
"""

from v4_ascend.backends.ascend import ASCEND
from v4_ascend.backends.backend import Backend, Proof
from v4_ascend.backends.cpu import CPU
from v4_ascend.backends.cuda import CUDA
from v4_ascend.backends.mindspore import MINDSPORE
from v4_ascend.errors import ConfigError

BACKENDS: dict[str, Backend] = {b.name: b for b in (CPU, ASCEND, CUDA, MINDSPORE)}

__all__ = ["BACKENDS", "Backend", "Proof", "find_backend"]


def find_backend(name: str, where: str = "--backend") -> Backend:
    """Return a backend by name.

    Raises:
        ConfigError: there is none of that name; `where` says who asked.
    """
    if name not in BACKENDS:
        raise ConfigError(where, f"no backend {name!r}; there is {', '.join(BACKENDS)}")
    return BACKENDS[name]


if __name__ != "v4_ascend.backends":
    raise ImportError(f"import v4_ascend.backends, not {__name__}")
