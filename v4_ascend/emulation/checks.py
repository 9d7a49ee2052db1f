"""What a vendor's kernel refuses, said with the argument, its value, the limit and the source."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

PAGE_ROWS = 16, 1024  # rows of a page: a multiple of the first, at most the second


class Checks:
    """The checks of one call.

    Attributes:
        op: the operator, for messages.
        source: where its limits are written.
    """

    def __init__(self, op: str, source: str) -> None:
        self.op, self.source = op, source

    def need(self, ok: bool, argument: str, value: Any, limit: str) -> None:
        """Refuse the call unless `ok`."""
        if not ok:
            raise RuntimeError(
                f"{self.op}: {argument} is {value}; {limit} [{self.source}] (error 561002)"
            )

    def given(self, **arguments: Any) -> None:
        """Refuse missing arguments."""
        for name, value in arguments.items():
            self.need(value is not None, name, None, "it must be given")

    def one_of(self, choices: Collection[Any], **arguments: Any) -> None:
        """Refuse values that are not among `choices`."""
        for name, value in arguments.items():
            said = ", ".join(str(c).removeprefix("torch.") for c in choices)
            self.need(value in choices, name, value, f"it must be {said}")

    def dtype(self, *allowed: torch.dtype, **tensors: torch.Tensor | None) -> None:
        """Refuse tensors of other dtypes; None is no tensor."""
        for name, t in tensors.items():
            if t is not None:
                self.one_of(allowed, **{f"{name}.dtype": t.dtype})

    def shape(self, *wanted: int | None, **tensors: torch.Tensor | None) -> None:
        """Refuse tensors of other shapes; None in `wanted` is any size."""
        for name, t in tensors.items():
            if t is None:
                continue
            fits = t.dim() == len(wanted) and all(
                w is None or w == n for w, n in zip(wanted, t.shape, strict=True)
            )
            said = ", ".join("any" if w is None else str(w) for w in wanted)
            self.need(fits, f"{name}.shape", list(t.shape), f"it must be [{said}]")

    def contiguous(self, **tensors: torch.Tensor | None) -> None:
        """Refuse tensors with gaps or another order of dims."""
        for name, t in tensors.items():
            if t is not None:
                self.need(
                    t.is_contiguous(), f"{name}.stride()", t.stride(), "it must be contiguous"
                )

    def pages(self, **caches: torch.Tensor | None) -> None:
        """Refuse paged caches [block_num, block_size, ...] whose pages a kernel cannot read."""
        step, most = PAGE_ROWS
        for name, cache in caches.items():
            if cache is not None:
                rows = cache.shape[1] if cache.dim() > 1 else 0
                limit = f"it must be a multiple of {step}, at most {most}"
                self.need(rows % step == 0 and 0 < rows <= most, f"{name} block_size", rows, limit)

    def prefix_sums(self, total: int, **tensors: torch.Tensor) -> None:
        """Refuse cumulative lengths that fall, or do not start at 0 and end at `total`."""
        for name, t in tensors.items():
            v = t.tolist()
            rising = all(a <= b for a, b in zip(v, v[1:], strict=False))
            limit = f"it must rise from 0 to {total}"
            self.need(bool(v) and v[0] == 0 and v[-1] == total and rising, name, v, limit)
