"""What an operator is: a reference, the cases that test it, the kernels that run it."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch

from v4_ascend.errors import KernelRegistrationError, UnsupportedOpError

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)
OPS: dict[str, Op[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a kernel may be from the reference. Every gate must hold.

    `rtol`/`atol` bound each element; `diff` bounds the whole tensor:
    ``1 - 2<x, y> / (<x, x> + <y, y>)``, which sees a small bias that
    elementwise bounds let through.
    """

    rtol: float
    atol: float
    diff: float


EXACT = Tolerance(rtol=0.0, atol=0.0, diff=0.0)
# One rounding of the output, plus a reordered fp32 sum.
ROUNDED = {
    torch.bfloat16: Tolerance(rtol=2**-7, atol=1e-3, diff=1e-5),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5, diff=1e-10),
}


# Models whose real widths a case has; a tiny case has those of none.
FLASH, PRO = ("flash",), ("pro",)
BOTH = FLASH + PRO
OF_DIM = {4096: FLASH, 7168: PRO}  # hidden size


@dataclass(frozen=True, slots=True)
class Case:
    """One set of inputs, made on the CPU from a seeded generator."""

    id: str
    make: Callable[[torch.Generator], dict[str, Any]]
    models: tuple[str, ...] = ()

    @property
    def slow(self) -> bool:
        """Whether it has real widths."""
        return bool(self.models)


@dataclass(frozen=True, slots=True)
class Kernel(Generic[P, R]):
    """One implementation of an op for one backend.

    Attributes:
        provider: whose code computes: ``torch_npu``, ``_C_ascend``, ``triton``, ``torch``, ...
        why_not: the call's arguments to the reason it is refused, or None. It looks at shapes,
            dtypes and plain numbers, never at values: a look would wait for the device.
    """

    name: str
    backend: str
    provider: str
    fn: Callable[P, R]
    why_not: Callable[P, str | None]


@dataclass(frozen=True, slots=True)
class Policy:
    """How calls choose their kernel; one value for the process.

    Attributes:
        backend: whose kernels are tried; None follows the device of the tensors.
        kernels: ``fast`` tries the backend's kernels in order; ``reference`` runs the
            references in their order, whatever the device.
        fallback: what a call does that no kernel of an accelerator accepts.
        around: makes every call of an op: gets the op, the chosen kernel and the arguments, and
            returns what the kernel returned.
        parts: whether an operator that does what several do gives way to these, so that a trace
            tells them apart.
    """

    backend: str | None = None
    kernels: Literal["fast", "reference"] = "fast"
    fallback: Literal["error", "reference"] = "error"
    around: Callable[..., Any] | None = None
    parts: bool = False


_policy = Policy()
BACKEND_OF_DEVICE = {"npu": "ascend"}  # where a backend is not named as its device type


class Op(Generic[P, R]):
    """An operator, called like the function that defines it."""

    def __init__(
        self,
        reference: Callable[P, R],
        cases: Callable[[], Iterable[Case]],
        tolerance: Mapping[torch.dtype, Tolerance],
        canonical: Callable[[Any], Any],
        mutates: tuple[str, ...],
    ) -> None:
        self.name = reference.__name__
        self.__doc__ = reference.__doc__
        self.reference = reference
        self.cases = cases
        self.tolerance = tolerance
        self.canonical = canonical
        self.mutates = mutates
        self.signature = inspect.signature(reference)
        self.kernels: dict[str, list[Kernel[P, R]]] = {}
        self._tried: dict[str, tuple[Kernel[P, R], ...]] = {}
        self._preparations: dict[str, Callable[..., None]] = {}
        if missing := set(mutates) - set(self.signature.parameters):
            raise KernelRegistrationError(f"{self.name} has no parameter {sorted(missing)}")

    def kernel(
        self, backend: str, *, provider: str, why_not: Callable[P, str | None] | None = None
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register an implementation for `backend`. Earlier kernels are tried first.

        Raises:
            KernelRegistrationError: other parameters than the op's, or a name taken.
        """

        def register(fn: Callable[P, R]) -> Callable[P, R]:
            got = list(inspect.signature(fn).parameters)
            want = list(self.signature.parameters)
            name = getattr(fn, "__name__", repr(fn))
            if got != want:
                raise KernelRegistrationError(
                    f"{fn.__module__}.{name} implements {self.name}({', '.join(want)}) "
                    f"but takes ({', '.join(got)})"
                )
            known = self.kernels.setdefault(backend, [])
            if any(k.name == name for k in known):
                raise KernelRegistrationError(f"{self.name} has two {backend} kernels named {name}")
            known.append(Kernel(name, backend, provider, fn, why_not or _accepts_all))
            self._tried[backend] = tuple(known)
            return fn

        return register

    def preparation(self, backend: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register what `backend` does once with this op's weights, when they are loaded.

        Raises:
            KernelRegistrationError: it takes something that is no parameter of the op.
        """

        def register(fn: Callable[..., None]) -> Callable[..., None]:
            if other := set(inspect.signature(fn).parameters) - set(self.signature.parameters):
                raise KernelRegistrationError(f"{self.name} has no parameter {sorted(other)}")
            self._preparations[backend] = fn
            return fn

        return register

    def prepare(self, *weights: torch.Tensor) -> None:
        """Let the backend make the layouts its kernels want of weights that will stay.

        The weights themselves keep the layout of the op's contract.
        """
        if _policy.kernels == "reference":
            return
        prepare = self._preparations.get(_policy.backend or _backend_of(weights, {}))
        if prepare is not None:
            prepare(*weights)

    def prepare_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Prepare the weights among a call's arguments, by the names they have there."""
        prepare = self._preparations.get(_policy.backend or _backend_of((), dict(inputs)))
        if prepare is not None and _policy.kernels != "reference":
            prepare(*(inputs[name] for name in inspect.signature(prepare).parameters))

    def try_in_order(self, backend: str, kernels: Iterable[Kernel[P, R]]) -> None:
        """Try these kernels of `backend` alone, in this order: what its present device has."""
        self._tried[backend] = tuple(kernels)

    def tried(self, backend: str) -> tuple[Kernel[P, R], ...]:
        """Return the kernels that calls on `backend` try, in order."""
        return self._tried.get(backend, ())

    def is_taken(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether the device has a kernel of its own for these arguments, plain torch aside.

        A model asks it of an operator that does what several others do.
        """
        if _policy.parts or _policy.kernels == "reference":
            return False
        tried = self.tried(_policy.backend or _backend_of(args, kwargs))
        return any(k.provider != "torch" and k.why_not(*args, **kwargs) is None for k in tried)

    def select(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """Return the first of the backend's kernels that accepts the arguments.

        On the CPU the reference is always the last choice.

        Raises:
            UnsupportedOpError: none does, and the fallback policy is ``error``.
        """
        if _policy.kernels == "reference":
            return self.reference
        backend = _policy.backend or _backend_of(args, kwargs)
        for kernel in self._tried.get(backend, ()):
            if kernel.why_not(*args, **kwargs) is None:
                return kernel.fn
        if backend == "cpu":
            return self.reference
        refusals = [f"{k.name}: {k.why_not(*args, **kwargs)}" for k in self.tried(backend)]
        if _policy.fallback == "error":
            call = ", ".join(_show(n, v) for n, v in self.bind(*args, **kwargs).items())
            raise UnsupportedOpError(self.name, backend, call, refusals)
        _log_fallback(self.name, backend, "; ".join(refusals) or "no kernel")
        return self.reference

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op on the device its tensors live on."""
        kernel = self.select(*args, **kwargs)
        if _policy.around is None:
            return kernel(*args, **kwargs)
        return _policy.around(self, kernel, *args, **kwargs)

    def inputs(self, case: Case) -> dict[str, Any]:
        """Make the case's CPU inputs: the same on every machine and in every run."""
        seed = int.from_bytes(hashlib.sha256(f"{self.name}/{case.id}".encode()).digest()[:8], "big")
        return case.make(torch.Generator().manual_seed(seed % 2**63))

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """Return a call's arguments by name, defaults among them."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


def op(
    *,
    cases: Callable[[], Iterable[Case]],
    tolerance: Mapping[torch.dtype, Tolerance],
    canonical: Callable[[Any], Any] = lambda outputs: outputs,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare the decorated function the reference, hence the definition, of an op.

    `canonical` brings outputs whose order the contract leaves open into one order before
    they are compared; `mutates` names the caches a call writes to.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        declared = Op(reference, cases, tolerance, canonical, mutates)
        if declared.name in OPS:
            raise KernelRegistrationError(f"two ops are named {declared.name}")
        OPS[declared.name] = declared
        return declared

    return declare


@contextmanager
def use_policy(**changes: Any) -> Iterator[None]:
    """Change how calls choose their kernel, in this process, inside this block."""
    global _policy
    before, _policy = _policy, replace(_policy, **changes)
    try:
        yield
    finally:
        _policy = before


def _accepts_all(*_args: Any, **_kwargs: Any) -> str | None:
    return None


def _backend_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    for value in args:
        if isinstance(value, torch.Tensor):
            device = value.device.type
            return BACKEND_OF_DEVICE.get(device, device)
    for value in kwargs.values():
        if isinstance(value, torch.Tensor):
            device = value.device.type
            return BACKEND_OF_DEVICE.get(device, device)
    return "cpu"


def _show(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{name}={str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{name}={value!r}"


@cache
def _log_fallback(name: str, device: str, why: str) -> None:
    log.warning("%s runs its reference on %s: %s", name, device, why)
