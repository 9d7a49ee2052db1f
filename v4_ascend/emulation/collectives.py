"""HCCL's call sites on gloo: the same collectives, on the same memory, through the CPU.

A group that was asked of HCCL has a communicator with a name, as torch_npu's has; vendor
operators that exchange by themselves find their ranks by it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from v4_ascend.emulation.device import on_cpu

_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
_NAME = "emulated-hccl-"
_asked: dict[str, str] = {}  # group names to the backends that were asked for


class Communicator:
    """What a group's HCCL backend tells of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_hccl_comm_name(self, rank: int, init_comm: bool = True) -> str:
        """Return the name by which operators address it; `rank` is ours in the group."""
        return self.name


def asked() -> dict[str, str]:
    """Return the groups this process made, by the backend they were asked of."""
    return dict(_asked)


def communicator(name: str) -> dist.ProcessGroup | None:
    """Return the group of a communicator's name, if there is one."""
    group_name = name.removeprefix(_NAME)
    if not name.startswith(_NAME) or not _is_hccl(group_name):
        return None
    try:
        found: Any = torch._C._distributed_c10d
        group: dist.ProcessGroup = found._resolve_process_group(group_name)
    except RuntimeError:  # it is gone
        return None
    return group


def _is_hccl(group_name: str) -> bool:
    return "hccl" in _asked.get(group_name, "")


def install() -> list[torch.library.Library]:
    """Let init_process_group("hccl") start gloo; keep what is returned alive."""
    library = torch.library.Library("c10d", "IMPL", "PrivateUse1")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("c10d::") or not has(name, "PrivateUse1"):
            continue
        base, _, overload = name.removeprefix("c10d::").partition(".")
        op = getattr(getattr(torch.ops.c10d, base), overload or "default")
        library.impl(name.removeprefix("c10d::"), on_cpu(op, name), allow_override=True)

    _start_gloo_for_hccl()
    return [library]


def _start_gloo_for_hccl() -> None:
    init, new, backend_of = (
        dist.init_process_group,
        dist.new_group,
        dist.ProcessGroup._get_backend,
    )

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        init(_gloo(backend), *args, **kwargs)
        _asked.clear()
        _note(dist.group.WORLD, backend)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        world: Any = dist.group.WORLD
        wanted = kwargs.get("backend") or _asked.get(world.group_name)
        if "backend" in kwargs:
            kwargs["backend"] = _gloo(kwargs["backend"])
        group = new(*args, **kwargs)
        _note(group, wanted)
        return group

    def get_backend(self: dist.ProcessGroup, device: torch.device) -> Any:
        if device.type == "npu" and _is_hccl(self.group_name):
            return Communicator(_NAME + self.group_name)
        return backend_of(self, device)

    dist.init_process_group = init_process_group
    dist.new_group = new_group
    dist.ProcessGroup._get_backend = get_backend  # type: ignore[method-assign]


def _note(group: Any, backend: str | None) -> None:
    if isinstance(group, dist.ProcessGroup):  # a rank that is in it
        _asked[group.group_name] = backend or ""


def _gloo(backend: str | None) -> str:
    # "cpu:gloo,npu:hccl" names a backend per device: here both are gloo.
    return "gloo" if backend is None or "hccl" in backend else backend
