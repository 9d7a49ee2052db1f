"""Operator equivalence on this machine: every kernel of a backend against the references."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from v4_ascend.backends import Backend, Proof
from v4_ascend.errors import ConfigError
from v4_ascend.ops import OPS, use_policy
from v4_ascend.ops.check import assert_close
from v4_ascend.ops.op import Case, Kernel, Op

Shapes = Literal["tiny", "flash", "pro"]
Outcome = Literal["passed", "failed", "refused"]


@dataclass(frozen=True, slots=True)
class Result:
    """One kernel on one case.

    Attributes:
        used: the largest part of the tolerance an element used, of a passed run.
        seconds: of one call, the first: compilation is in it.
        why: of a failure or a refusal.
    """

    op: str
    case: str
    kernel: str
    provider: str
    outcome: Outcome
    proof: Proof
    used: float = 0.0
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """What to verify: parts of names, None for all."""

    op: str | None = None
    case: str | None = None
    shapes: Shapes = "tiny"

    def ops(self) -> list[Op[..., Any]]:
        """Return the chosen operators.

        Raises:
            ConfigError: there is no such operator.
        """
        if self.op is None:
            return list(OPS.values())
        if self.op not in OPS:
            raise ConfigError("--op", f"no operator {self.op!r}; there is {', '.join(OPS)}")
        return [OPS[self.op]]

    def cases(self, op: Op[..., Any]) -> list[Case]:
        """Return the chosen cases of an operator."""
        return [
            c
            for c in op.cases()
            if (self.shapes in c.models if self.shapes != "tiny" else not c.models)
            and (self.case is None or self.case in c.id)
        ]


def verify(
    backend: Backend, selection: Selection, progress: Callable[[int, int], None]
) -> Iterator[Result]:
    """Run every kernel on every case; on the CPU, where a reference is the kernel, twice that.

    Raises:
        ConfigError: nothing is chosen.
    """
    chosen = [(op, case) for op in selection.ops() for case in selection.cases(op)]
    if not chosen:
        of = selection.op or "any operator"
        named = f" has {selection.case!r} in its name" if selection.case else ""
        raise ConfigError("--case", f"no {selection.shapes} case of {of}{named}")
    for done, (op, case) in enumerate(chosen):
        want: Any = None
        for kernel in _kernels(op, backend):
            with torch.inference_mode(), use_policy(backend=backend.name, kernels="fast"):
                inputs = _on(backend.device(), op.inputs(case))
                op.prepare_inputs(inputs)
                why = kernel.why_not(**inputs)
                if why is not None:
                    yield Result(
                        op.name,
                        case.id,
                        kernel.name,
                        kernel.provider,
                        "refused",
                        backend.proof(),
                        why=why,
                    )
                    continue
                if want is None:
                    with use_policy(backend="cpu", kernels="reference"):  # of what it calls, too
                        want = _all_outputs(op, op.inputs(case), op.reference)
                yield _run(op, case, kernel, backend, inputs, want)
        progress(done + 1, len(chosen))


def _kernels(op: Op[..., Any], backend: Backend) -> list[Kernel[..., Any]]:
    kernels = list(op.tried(backend.name))
    if backend.name == "cpu":
        kernels.append(Kernel("reference", "cpu", "torch", op.reference, lambda *a, **k: None))
    return kernels


def _run(
    op: Op[..., Any],
    case: Case,
    kernel: Kernel[..., Any],
    backend: Backend,
    inputs: dict[str, Any],
    want: Any,
) -> Result:
    start = time.perf_counter()
    who = (op.name, case.id, kernel.name, kernel.provider)
    try:
        got = _all_outputs(op, inputs, kernel.fn)  # brings them to the host, so waits for them
        seconds = time.perf_counter() - start
        used = assert_close(got, want, op.tolerance)
    except Exception as e:  # noqa: BLE001  # whatever stops a kernel is what a report is for
        why = f"{type(e).__name__}: {e}" if not isinstance(e, AssertionError) else str(e)
        spent = time.perf_counter() - start
        return Result(*who, "failed", backend.proof(), seconds=spent, why=why)
    return Result(*who, "passed", backend.proof(), used=used, seconds=seconds)


def _all_outputs(
    op: Op[..., Any], inputs: dict[str, Any], run: Callable[..., Any]
) -> tuple[torch.Tensor, ...]:
    """What a call returned and what it wrote, in the contract's order, on the host."""
    result = op.canonical(run(**inputs))
    outputs = list(result) if isinstance(result, tuple) else [result]
    outputs += [inputs[name] for name in op.mutates]
    return tuple(o.cpu() for o in outputs)


def _on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
