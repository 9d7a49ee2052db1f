"""A CPU's graph: the calls of a step, recorded once and made again on the same memory.

Recorded are torch's own operators, as its dispatcher sees them, and the functions of the compiled
library. Made again they skip what the host did in between: choosing kernels, checking shapes,
allocating. Views are not made again, as they show the memory that is filled again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from v4_ascend.backends.cpu.compiled import library
from v4_ascend.errors import CaptureError

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
CONSISTS_OF_OTHERS = torch._C.DispatchKey.CompositeImplicitAutograd
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
COPIES = {"clone", "_to_copy"}
CLEARS = {"zeros", "zeros_like", "new_zeros"}


def record_calls(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
    """Record a run; return its result's place, and what fills it again.

    Raises:
        CaptureError: the run asks for a value, or for a shape that depends on values.
    """
    recording = _Recording()
    with library.recorded(recording.called), _NoLists(), recording:
        result = run()

    return result, _Replay(recording.calls, recording.kept)


class _Replay:
    """Makes recorded calls again; of those of the compiled library that follow each other, one."""

    def __init__(self, calls: list[Call], kept: list[Any]) -> None:
        self._kept = kept
        self._calls: list[Call] = []
        ours: list[tuple[library.Function, library.Arguments]] = []
        for fn, args, kwargs in calls:
            if isinstance(fn, library.Function):
                ours.append((fn, args))
                continue
            self._close(ours)
            self._calls.append((fn, args, kwargs))
        self._close(ours)

    def _close(self, ours: list[tuple[library.Function, library.Arguments]]) -> None:
        if ours:
            self._calls.append((library.Calls(ours), (), {}))
            ours.clear()

    def __call__(self) -> None:
        for fn, args, kwargs in self._calls:
            fn(*args, **kwargs)


class _NoLists(TorchFunctionMode):
    """Refuses what reads memory past the dispatcher."""

    def __torch_function__(
        self, fn: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if fn in (torch.Tensor.tolist, torch.Tensor.numpy):
            raise CaptureError(f"Tensor.{fn.__name__} reads values on the host")
        return fn(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    """Sees each call below the level on which operators consist of others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.kept: list[Any] = []  # a pointer among the arguments of a call keeps nothing alive

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out what torch would load for a mode to be compiled: 4 seconds."""
        return False

    def called(self, fn: library.Function, args: library.Arguments) -> None:
        """Note a call of the compiled library."""
        self.calls.append((fn, args, {}))

    def __torch_dispatch__(
        self, fn: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _consists_of_others(fn):
            with self:  # they are recorded in its place
                return fn._op_dk(CONSISTS_OF_OTHERS, *args, **kwargs)
        _require_fixed_shape(fn, args)
        result = fn(*args, **kwargs)
        self.kept.append(result)
        self._note(fn, args, kwargs, result)
        return result

    def _note(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = fn.overloadpacket.__name__
        if name == "detach_":  # how `torch.tensor` ends
            return
        if fn._schema.is_mutable:
            method = getattr(torch.Tensor, name, fn) if name.endswith("_") else fn
            self.calls.append((method, args, kwargs))
        elif name in ALLOCATES:
            return
        elif not isinstance(result, torch.Tensor):
            self.calls.append((_refill, (tuple(result), fn, args, kwargs), {}))
        elif name in CLEARS:
            self.calls.append((torch.Tensor.zero_, (result,), {}))
        else:
            inputs = [*_tensors(args), *_tensors(kwargs.values())]
            if _shows_any(result, inputs):
                return
            if not inputs:  # a constant, which may be written to
                self.calls.append((torch.Tensor.copy_, (result, result.clone()), {}))
            elif name in COPIES:
                self.calls.append((torch.Tensor.copy_, (result, args[0]), {}))
            elif (into := _out_variant(fn)) is not None:
                kwargs = {**kwargs, "out": result}
                self.calls.append((_bound(name, into, args, kwargs), args, kwargs))
            else:
                self.calls.append((_refill, ((result,), fn, args, kwargs), {}))


@cache
def _consists_of_others(fn: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(fn.name(), CONSISTS_OF_OTHERS))


def _require_fixed_shape(fn: Any, args: tuple[Any, ...]) -> None:
    if torch.Tag.data_dependent_output in fn.tags:
        raise CaptureError(f"{fn} reads a value on the host")
    if torch.Tag.dynamic_output_shape not in fn.tags:
        return
    is_mask = any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1:]))
    if is_mask or fn is not torch.ops.aten.index.Tensor:
        raise CaptureError(f"how large {fn} is depends on values")


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Go through tensors and lists of them, as operators take them."""
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _shows_any(x: torch.Tensor, others: list[torch.Tensor]) -> bool:
    place = x.untyped_storage().data_ptr()
    return any(place == other.untyped_storage().data_ptr() for other in others)


@cache
def _out_variant(fn: Any) -> Any:
    """Return the overload of the same arguments that fills a given tensor, if there is one."""
    own = [(a.name, str(a.type)) for a in fn._schema.arguments]
    for name in fn.overloadpacket.overloads():
        other = getattr(fn.overloadpacket, name)
        arguments = [(a.name, str(a.type)) for a in other._schema.arguments]
        if arguments == [*own, ("out", "Tensor")]:
            return other
    return None


def _bound(name: str, into: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return torch's Python function that does this call, a fifth of the time, or `into`."""
    function = getattr(torch._C._VariableFunctions, name, None)
    if function is None:
        return into
    try:
        function(*args, **kwargs)  # gives what is there
    except TypeError:  # it takes other arguments
        return into
    return function


def _refill(results: tuple[torch.Tensor, ...], fn: Any, args: Any, kwargs: Any) -> None:
    made = fn(*args, **kwargs)
    for place, value in zip(results, (made,) if len(results) == 1 else made, strict=True):
        place.copy_(value)
