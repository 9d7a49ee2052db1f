"""Tensors between torch and MindSpore without a copy, and calls into MindSpore.

Both sides see the same memory (DLPack). Kernels live in `net`, whose modules import MindSpore
at the top; this one does so at the first call, so that registering costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack as torch_from_dlpack

# A whole function as one graph, or operator by operator. One value for the process.
_graph = False
# MindSpore reads these dtypes from DLPack; other one-byte ones travel as bytes.
_AS_BYTES = (torch.bool, torch.float8_e4m3fn, torch.float8_e8m0fnu)


@contextmanager
def graph_mode() -> Iterator[None]:
    """Compile every kernel with ``mindspore.jit`` inside this block."""
    global _graph
    before, _graph = _graph, True
    try:
        yield
    finally:
        _graph = before


def run(function: str, *args: Any) -> Any:
    """Call ``net.MODULE.NAME``, given as ``MODULE.NAME``, on torch tensors and plain values.

    Tensors go in and come out as torch tensors over the same memory.
    """
    got = _function(function, _graph)(*(to_mindspore(a) for a in args))
    if isinstance(got, tuple):
        return tuple(to_torch(g) for g in got)
    return to_torch(got)


@cache
def _function(name: str, graph: bool) -> Any:
    import mindspore

    module, _, attribute = name.partition(".")
    function = getattr(import_module(f"v4_ascend.backends.mindspore.net.{module}"), attribute)
    return mindspore.jit(function) if graph else function


def to_mindspore(value: Any) -> Any:
    """Share a torch tensor with MindSpore; anything else passes as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    from mindspore.utils.dlpack import from_dlpack

    tensor = value.detach().contiguous()
    if tensor.dtype in _AS_BYTES:
        tensor = tensor.view(torch.uint8)
    return from_dlpack(tensor.__dlpack__())


def to_torch(value: Any) -> torch.Tensor:
    """Share a MindSpore tensor with torch, once it is computed."""
    from mindspore.utils.dlpack import to_dlpack

    return torch_from_dlpack(to_dlpack(value.contiguous()))


def rows_of(storage: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Gather rows of a plain paged cache with MindSpore, [n, width] of the storage's dtype.

    bf16 rows go as pairs in int32: MindSpore's CPU target has no bf16 gather, and a gather
    looks at no values.
    """
    flat = storage.view(-1, storage.shape[-1])
    if flat.dtype == torch.bfloat16:
        return run("paging.rows", flat.view(torch.int32), slots).view(torch.bfloat16)
    return torch.as_tensor(run("paging.rows", flat, slots))
