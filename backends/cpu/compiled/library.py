"""The CPU's compiled kernels: a library of plain C functions, built with the package.

It is optional: where there was no C++ compiler, every kernel of it is refused with that reason and
the plain ones run. It links no OpenMP of its own; its loops run on the threads torch has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

NAME = "v4_ascend.backends.cpu.compiled._kernels"
FEW = 64  # tokens; of more, matrix products by torch are faster than single rows of ours
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    spec = find_spec(NAME)
    if spec is None or spec.origin is None:
        return None, "the compiled kernels were not built: v4-ascend was installed without g++"
    try:
        return ctypes.CDLL(spec.origin), None
    except OSError as e:
        return None, f"the compiled kernels do not load: {e}"


_library, MISSING = _load()
Recorder = Callable[[Callable[..., int], tuple[Any, ...]], None]
_recorders: list[Recorder] = []


def function(name: str, arguments: str) -> Callable[..., int]:
    """Return a function of the library; each argument is a pointer, an integer or a float.

    Most return nothing, and what comes back of them means nothing.
    """
    if _library is None:
        return _refuse
    found: Any = getattr(_library, name)
    found.argtypes = [_TYPES[a] for a in arguments]
    found.restype = ctypes.c_int64

    def call(*args: Any) -> int:
        for note in _recorders:
            note(found, args)
        return int(found(*args))

    return call


@contextmanager
def recorded(note: Recorder) -> Iterator[None]:
    """Show every call in this block to `note`. What an argument points to must outlive it."""
    _recorders.append(note)
    try:
        yield
    finally:
        _recorders.remove(note)


def _refuse(*_arguments: Any) -> int:
    raise RuntimeError(str(MISSING))  # why_not has said so already


# Whether the machine multiplies sixteen floats at once (AVX-512).
IS_WIDE = MISSING is None and bool(function("has_wide_vectors", "")())


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """Refuse where there is no library, or tensors are neither fp32 nor bf16."""
    if MISSING is not None:
        return MISSING
    for t in tensors:
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16):
            return f"{str(t.dtype).removeprefix('torch.')}, not fp32 or bf16"
    return None


def pointer(x: torch.Tensor | None) -> int | None:
    """Return where a tensor's data begins.

    Raises:
        ValueError: it is not contiguous: what lies there is not what it shows.
    """
    if x is None:
        return None
    if not x.is_contiguous():
        raise ValueError(f"a tensor of strides {x.stride()} for shape {tuple(x.shape)}")
    return x.data_ptr()


def is_bf16(x: torch.Tensor) -> bool:
    """Say which of the library's two types a tensor has."""
    return x.dtype == torch.bfloat16
