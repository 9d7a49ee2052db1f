"""How often each vendor operator was called, so that a run can print and assert it."""

from __future__ import annotations

from collections import Counter

_calls: Counter[str] = Counter()


def record(name: str) -> None:
    """Count one call of the operator `name`, for example ``npu::npu_rms_norm``."""
    _calls[name] += 1


def calls(namespace: str | None = None) -> dict[str, int]:
    """Return the number of calls by operator, of one namespace or of all of them.

    Namespaces: ``_C_ascend`` (vllm-ascend), ``npu`` (torch_npu), ``c10d`` (collectives) and
    ``aten`` (plain torch operators on the emulated device).
    """
    wanted = "" if namespace is None else f"{namespace}::"
    return {name: n for name, n in sorted(_calls.items()) if name.startswith(wanted)}


def reset_calls() -> None:
    """Forget every call counted so far."""
    _calls.clear()
