"""HCCL's call sites on gloo: the same collectives, on the same memory, through the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from v4_ascend.emulation.device import on_cpu

_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


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

    init, new = dist.init_process_group, dist.new_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        init(_gloo(backend), *args, **kwargs)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        if "backend" in kwargs:
            kwargs["backend"] = _gloo(kwargs["backend"])
        return new(*args, **kwargs)

    dist.init_process_group = init_process_group
    dist.new_group = new_group
    return [library]


def _gloo(backend: str | None) -> str:
    # "cpu:gloo,npu:hccl" names a backend per device: here both are gloo.
    return "gloo" if backend is None or "hccl" in backend else backend
