"""Registers launch functions by name: triton is imported at the first call of one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from v4_ascend.ops.op import Op


def watch_compilations(tell: Callable[[str], None]) -> None:
    """Let `tell` hear of each kernel compiled from now on, or read compiled from a folder.

    Without triton, or interpreted, none is.
    """
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return
    from triton import knobs

    knobs.runtime.jit_post_compile_hook = lambda *, repr, **_facts: tell(repr)


@cache
def load(module: str, name: str) -> Callable[..., Any]:
    """Import a launch function of ``backends.MODULE``, the interpreter mended first."""
    from v4_ascend.backends.triton.interpreter import mend

    mend()
    launch: Callable[..., Any] = getattr(import_module(f"v4_ascend.backends.{module}"), name)
    return launch


def register(
    op: Op[..., Any],
    module: str,
    why_not: Callable[..., str | None] | None = None,
    *,
    backend: str = "cuda",
) -> None:
    """Let `op` run ``backends.MODULE.OP``; `module` is of the folder whose kernels they are."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return load(module, op.name)(*args, **kwargs)

    kernel.__name__ = f"{module.partition('.')[0]}_{op.name}"
    kernel.__doc__ = f"Launch backends.{module}.{op.name}."
    kernel.__signature__ = op.signature  # type: ignore[attr-defined]  # inspect honours it
    op.kernel(backend, provider="triton", why_not=why_not)(kernel)
