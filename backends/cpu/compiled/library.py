"""The CPU's compiled kernels: a library of plain C functions, built with the package.

It is optional: where there was no C++ compiler, every kernel of it is refused with that reason and
the plain ones run. It links no OpenMP of its own; its loops run on the threads torch has.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
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
Arguments = tuple[Any, ...]


def _refuse(*_arguments: Any) -> int:
    raise RuntimeError(str(MISSING))  # why_not has said so already


class Function:
    """A function of the library; each argument is a pointer, an integer or a float.

    Most return nothing, and what comes back of them means nothing.
    """

    def __init__(self, name: str, arguments: str) -> None:
        self.__name__, self._types = name, arguments
        self._found: Any = _refuse
        if _library is not None:
            self._found = getattr(_library, name)
            self._found.argtypes = [_TYPES[a] for a in arguments]
            self._found.restype = ctypes.c_int64

    def __call__(self, *args: Any) -> int:
        """Call it."""
        for note in _recorders:
            note(self, args)
        return int(self._found(*args))

    @property
    def packed(self) -> int | None:
        """Where the function lies that takes its arguments from memory."""
        found = getattr(_library, f"{self.__name__}_packed")
        return ctypes.cast(found, ctypes.c_void_p).value

    def pack(self, args: Arguments) -> ctypes.Array[ctypes.c_int64]:
        """Lay arguments out as that function reads them."""
        words = (
            int.from_bytes(struct.pack("<f", a), "little") if t == "f" else int(a or 0)
            for t, a in zip(self._types, args, strict=True)
        )
        return (ctypes.c_int64 * len(args))(*words)


Recorder = Callable[[Function, Arguments], None]
_recorders: list[Recorder] = []


class Calls:
    """Calls made one after the other, without Python between them."""

    def __init__(self, calls: Sequence[tuple[Function, Arguments]]) -> None:
        self._n = len(calls)
        self._functions = (ctypes.c_void_p * self._n)(*(f.packed for f, _ in calls))
        self._packed = [f.pack(args) for f, args in calls]
        self._arguments = (ctypes.c_void_p * self._n)(*map(ctypes.addressof, self._packed))
        self._make: Any = _library and _library.make_calls

    def __call__(self) -> None:
        """Make them."""
        self._make(self._functions, self._arguments, self._n)


@contextmanager
def recorded(note: Recorder) -> Iterator[None]:
    """Show every call in this block to `note`. What an argument points to must outlive it."""
    _recorders.append(note)
    try:
        yield
    finally:
        _recorders.remove(note)


# Whether the machine multiplies sixteen floats at once (AVX-512).
IS_WIDE = MISSING is None and bool(Function("has_wide_vectors", "")())


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
