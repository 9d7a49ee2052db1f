"""What a checkpoint has, compared with what its config says it should have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.config.inventory import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Counts and bytes per dtype, and every difference from the inventory."""

    n_tensors: int
    nbytes: int
    tensors_by_dtype: Mapping[str, int]
    bytes_by_dtype: Mapping[str, int]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    total_size: int | None  # what the index says

    @property
    def problems(self) -> tuple[str, ...]:
        """Every difference, one sentence each."""
        return (
            *(f"{name} is missing" for name in self.missing),
            *(f"{name} is not part of this model" for name in self.unexpected),
            *self.mismatched,
            *self._miscounted(),
        )

    def _miscounted(self) -> Iterator[str]:
        if self.total_size is not None and self.total_size != self.nbytes:
            yield f"the index says {self.total_size:,} bytes, the files hold {self.nbytes:,}"


def inspect_headers(
    headers: Mapping[str, TensorHeader], specs: Iterable[TensorSpec], total_size: int | None
) -> Inspection:
    """Compare headers with an inventory."""
    expected = {s.name: s for s in specs}
    counts = Counter(h.dtype for h in headers.values())
    nbytes: Counter[str] = Counter()
    for h in headers.values():
        nbytes[h.dtype] += h.nbytes
    both = [(headers[n], s) for n, s in expected.items() if n in headers]
    return Inspection(
        n_tensors=len(headers),
        nbytes=sum(nbytes.values()),
        tensors_by_dtype=dict(sorted(counts.items())),
        bytes_by_dtype=dict(sorted(nbytes.items())),
        missing=tuple(n for n in expected if n not in headers),
        unexpected=tuple(n for n in headers if n not in expected),
        mismatched=tuple(
            f"{h.file.name}: {h.name} is {h.dtype} {list(h.shape)}, "
            f"expected {s.dtype} {list(s.shape)}"
            for h, s in both
            if (h.dtype, h.shape) != (s.dtype, s.shape)
        ),
        total_size=total_size,
    )
