"""Plain torch operators on the emulated device: the CPU's kernel on the same memory.

Device memory is host memory, so a CPU tensor over it costs nothing. Operands on different
devices are refused as hardware refuses them, except scalars of no dimension on the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from v4_ascend.emulation import call_log

NPU = "npu"

# Handled by torch_npu itself (its allocator, its tensor type), or above the kernels.
_KEPT = frozenset(
    (
        "aten::empty.memory_format",
        "aten::empty_strided",
        "aten::as_strided",
        "aten::view",
        "aten::view.dtype",
        "aten::_reshape_alias",
        "aten::alias",
        "aten::detach",
        "aten::unfold",
        "aten::contiguous",
        "aten::_unsafe_view",
        "aten::record_stream",
        "aten::resize_",
        "aten::set_",
        "aten::set_.source_Storage",
        "aten::set_.source_Storage_storage_offset",
        "aten::set_.source_Tensor",
        "aten::set_.source_Tensor_storage_offset",
        "aten::is_set_to",
        "aten::is_pinned",
        "aten::_pin_memory",
        "aten::_has_compatible_shallow_copy_type",
    )
)
# Written below: they cross devices on purpose.
_CROSSING = frozenset(("aten::copy_", "aten::_to_copy", "aten::_local_scalar_dense"))
# torch takes indices from the CPU on any device.
_INDICES_ANYWHERE = frozenset(
    ("aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put")
)


def cpu_view(t: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor over the memory of an emulated one."""
    storage = t.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    whole = storage.nbytes() // t.element_size() * t.element_size()
    return flat[:whole].view(t.dtype).as_strided(t.size(), t.stride(), t.storage_offset())


def to_device(t: torch.Tensor, index: int) -> torch.Tensor:
    """Copy a CPU tensor to the emulated device, strides included."""
    out = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=f"{NPU}:{index}")
    if t.numel():
        cpu_view(out).copy_(t)
    return out


def on_cpu(op: Callable[..., Any], name: str, indices_anywhere: bool = False) -> Callable[..., Any]:
    """Wrap a function of CPU tensors into one of emulated tensors.

    What it returns lies on the device; a result that shares an argument's memory still
    does. Calls are counted under `name`.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        call_log.record(name)
        places = _Places(name, indices_anywhere)
        cpu_args = tree_map(places.leave, args)
        cpu_kwargs = tree_map(places.leave, kwargs)
        return tree_map(places.enter, op(*cpu_args, **cpu_kwargs))

    return call


def _index(device: torch.device) -> int:
    return torch.npu.current_device() if device.index is None else device.index


class _Places:
    """Takes one call's tensors off the device, and its results back."""

    def __init__(self, name: str, indices_anywhere: bool) -> None:
        self.name, self.indices_anywhere = name, indices_anywhere
        self.device: torch.device | None = None
        self.cpu_seen = False
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def leave(self, x: Any) -> Any:
        if isinstance(x, torch.device):
            if x.type != NPU:
                return x
            if self.device is None:
                self.device = torch.device(NPU, _index(x))
            return torch.device("cpu")
        if not isinstance(x, torch.Tensor):
            return x
        if x.device.type != NPU:
            if x.dim() and not self.indices_anywhere:
                self.cpu_seen = True
                if self.given:
                    self._refuse(x.device)
            return x
        if self.cpu_seen:
            self._refuse(torch.device("cpu"), x.device)
        if self.given and self.device is not None and x.device != self.device and x.dim():
            self._refuse(x.device)
        self.device = x.device
        view = cpu_view(x)
        # A storage of its own for every argument: remember it by its address.
        self.given[view.untyped_storage().data_ptr()] = (x, view)
        self.given.setdefault(id(view), (x, view))
        return view

    def enter(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
            return x
        if id(x) in self.given:
            source, view = self.given[id(x)]
            if view.size() == source.size():
                return source
            source.resize_(view.size())  # an `out` argument that was too small
            cpu_view(source).copy_(view)
            return source
        shared = self.given.get(x.untyped_storage().data_ptr())
        if shared is not None and x.numel() and x.dtype == shared[0].dtype:
            return shared[0].as_strided(x.size(), x.stride(), x.storage_offset())
        return to_device(x, _index(self.device or torch.device(NPU)))

    def _refuse(self, other: torch.device, first: torch.device | None = None) -> None:
        raise RuntimeError(
            f"{self.name}: Expected all tensors to be on the same device, but found at least "
            f"two devices, {first or self.device} and {other}!"
        )


def _copy_(self: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    call_log.record("aten::copy_")
    to = cpu_view(self) if self.device.type == NPU else self
    to.copy_(cpu_view(src) if src.device.type == NPU else src)
    return self


def _to_copy(
    self: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    source = cpu_view(self) if self.device.type == NPU else self
    to = self.device if device is None else torch.device(device)
    copied = torch.ops.aten._to_copy(source, dtype=dtype, device="cpu", memory_format=memory_format)
    if to.type != NPU:
        return copied
    return to_device(copied, _index(to))


class Kernels:
    """Kernels for the emulated device, which last as long as this object."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.library = torch.library.Library(namespace, "IMPL", "PrivateUse1")
        self.autograd = torch.library.Library(namespace, "IMPL", "AutogradPrivateUse1")

    def register(self, name: str, kernel: Callable[..., Any]) -> None:
        """Make `kernel` what an operator does on the device.

        torch_npu's own autograd kernels call the device around the dispatcher, so they go:
        the emulated device is for inference.
        """
        self.library.impl(name, kernel, allow_override=True)
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        if has(f"{self.namespace}::{name}", "AutogradPrivateUse1"):
            self.autograd.impl(name, torch.library.fallthrough_kernel, allow_override=True)


def install() -> Kernels:
    """Give every plain operator of torch_npu its CPU kernel; keep what is returned alive."""
    kernels = Kernels("aten")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        if namespace != "aten" or name in _KEPT | _CROSSING or not has(name, "PrivateUse1"):
            continue
        base, _, overload = rest.partition(".")
        packet = getattr(torch.ops.aten, base, None)
        if packet is None:  # a kernel without a schema: nothing can call it
            continue
        op = getattr(packet, overload or "default")
        kernel = on_cpu(op, name, name in _INDICES_ANYWHERE)
        kernels.register(rest, kernel)
    kernels.register("copy_", _copy_)
    kernels.register("_to_copy", _to_copy)
    kernels.register("_local_scalar_dense", lambda t: cpu_view(t).item())
    return kernels
