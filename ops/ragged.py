"""Ragged batches: which request a token belongs to, and where in it.

``cu_seqlens[b]`` is the first token of request b in the batch, ``seq_lens[b]`` its length
including this step's tokens; so its tokens sit at positions seq_lens[b] - n .. seq_lens[b] - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """One request's part of a step: tokens [begin, end) of the batch, at positions start + i."""

    request: int
    begin: int
    end: int
    start: int

    @property
    def stop(self) -> int:
        """Sequence length after this step."""
        return self.start + self.end - self.begin


def spans(seq_lens: torch.Tensor, cu_seqlens: torch.Tensor) -> Iterator[Span]:
    """Yield every request's part of the step, in order."""
    bounds: list[int] = cu_seqlens.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        begin, end = bounds[request], bounds[request + 1]
        yield Span(request, begin, end, length - (end - begin))


def locate(seq_lens: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's request and position, [n_tokens] int64."""
    counts = cu_seqlens.diff().long()
    request = torch.repeat_interleave(counts)
    starts = seq_lens.long() - cu_seqlens[1:].long()
    return request, torch.arange(len(request), device=request.device) + starts[request]


def max_new_rows(n_tokens: int, n_requests: int, compress_ratio: int) -> int:
    """Bound the rows a step can complete, without looking at the lengths."""
    return min(n_tokens, n_tokens // compress_ratio + n_requests)
