"""Which kernel would run each operator at the models' real shapes, on any device, from anywhere.

Kernels decide by shapes and dtypes alone, so the answer needs neither the device nor its
library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from v4_ascend.backends import Backend
from v4_ascend.ops import OPS, use_policy
from v4_ascend.ops.op import Case, Op

MODELS = ("flash", "pro")


@dataclass(frozen=True, slots=True)
class Choice:
    """What one operator would do with one case.

    Attributes:
        kernel, provider: of the first that accepts; empty if none does.
        refusals: of the kernels before it, ``name: why``.
    """

    case: str
    models: tuple[str, ...]
    kernel: str
    provider: str
    refusals: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Capability:
    """One operator on one backend; `missing` is why no kernel exists."""

    op: str
    choices: tuple[Choice, ...]
    missing: str | None

    @property
    def kernels(self) -> dict[str, list[Choice]]:
        """Return the choices by the kernel they fall on, '' for none."""
        by_kernel: dict[str, list[Choice]] = {}
        for choice in self.choices:
            by_kernel.setdefault(choice.kernel, []).append(choice)
        return by_kernel


class Probes:
    """Arguments at real shapes: made once, asked about by every backend."""

    def __init__(self) -> None:
        self._inputs: dict[str, list[tuple[Case, dict[str, Any]]]] = {}

    def of(self, op: Op[..., Any]) -> list[tuple[Case, dict[str, Any]]]:
        """Return the cases of both models that a deployment meets, and their arguments."""
        if op.name not in self._inputs:
            cases = [c for c in op.cases() if c.models and not _is_fp32(c)]
            self._inputs[op.name] = [(c, op.inputs(c)) for c in cases]
        return self._inputs[op.name]


def _is_fp32(case: Case) -> bool:
    """fp32 streams are for tests; V4 is served in bf16."""
    return "float32" in case.id or case.id.startswith("fp32")


def capabilities(backend: Backend, chip: str | None, probes: Probes) -> list[Capability]:
    """Ask every operator; `chip` is one of the backend's."""
    backend.use_chip(chip)
    with torch.inference_mode(), use_policy(backend=backend.name, kernels="fast"):
        return [_capability(op, backend, probes) for op in OPS.values()]


def _capability(op: Op[..., Any], backend: Backend, probes: Probes) -> Capability:
    if backend.name == "cpu":
        case = Choice("every case", MODELS, "reference", "torch", ())
        return Capability(op.name, (case,), None)
    if op.name in backend.missing:
        return Capability(op.name, (), backend.missing[op.name])
    return Capability(
        op.name, tuple(_choice(op, backend, case, a) for case, a in probes.of(op)), None
    )


def _choice(op: Op[..., Any], backend: Backend, case: Case, arguments: dict[str, Any]) -> Choice:
    op.prepare_inputs(arguments)
    refusals: list[str] = []
    for kernel in op.tried(backend.name):
        why = kernel.why_not(**arguments)
        if why is None:
            return Choice(case.id, case.models, kernel.name, kernel.provider, tuple(refusals))
        refusals.append(f"{kernel.name}: {why}")
    return Choice(case.id, case.models, "", "", tuple(refusals))
