"""What is made once of a tensor and used by every call that gets the same tensor again.

Weights have the layouts their kernels want; a step's lengths have the vendor's scheduling
tables. Both go when the tensor they belong to goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


def keep(tensor: torch.Tensor, what: str, value: Any) -> None:
    """Remember `value` as long as this very tensor lives; it must not hold the tensor."""
    _made.setdefault(tensor, {})[what] = value


def let_go(tensor: torch.Tensor) -> None:
    """Free what a tensor holds, now that kernels read what was made of it; its shape stays.

    Whoever would read it has to refuse: `ops.int8_fused.is_let_go`.
    """
    tensor.data = tensor.new_zeros(1).expand(tensor.shape)


def has(tensor: torch.Tensor, what: str) -> bool:
    """Whether `what` was made of this very tensor."""
    return what in _made.get(tensor, {})


def get(tensor: torch.Tensor, what: str) -> Any:
    """Return what was made of this very tensor."""
    return _made[tensor][what]


def once(tensor: torch.Tensor, what: object, make: Callable[[], T]) -> T:
    """Return what was made of this very tensor before, or make it now.

    A tensor that is written to in place between two calls keeps what was made first: lengths
    of a step are new tensors in every step.
    """
    made: dict[object, T] = _made.setdefault(tensor, {})
    if what not in made:
        made[what] = make()
    return made[what]


def once_a_step(
    seq_lens: torch.Tensor, cu_seqlens: torch.Tensor, what: object, make: Callable[[], T]
) -> T:
    """As `once`, of the two tensors that say what a step is: decoding may share one of them."""
    of_step: tuple[Any, dict[object, T]]
    of_step = once(cu_seqlens, "step", lambda: (weakref.ref(seq_lens), {}))
    if of_step[0]() is not seq_lens:
        of_step = (weakref.ref(seq_lens), {})
        keep(cu_seqlens, "step", of_step)
    if what not in of_step[1]:
        of_step[1][what] = make()
    return of_step[1][what]
