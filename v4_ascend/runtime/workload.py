"""One step to be timed, and seeded tensors for it on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from v4_ascend.ops import act_quant, formats, store_rows
from v4_ascend.ops.records import RECORDS

BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Workload:
    """One step: `batch` sequences with `tokens` new ones each, `context` behind them."""

    batch: int
    tokens: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read ``decode:BATCH:CONTEXT`` or ``prefill:TOKENS:CONTEXT``.

        Raises:
            ValueError: it is neither.
        """
        kind, _, rest = text.partition(":")
        first, _, context = rest.partition(":")
        if kind not in ("decode", "prefill") or not first.isdigit() or not context.isdigit():
            raise ValueError(f"{text!r} is neither decode:BATCH:CONTEXT nor prefill:TOKENS:CONTEXT")
        n = int(first)
        return cls(n, 1, int(context)) if kind == "decode" else cls(1, n, int(context))

    @property
    def n(self) -> int:
        """Tokens of the step."""
        return self.batch * self.tokens

    def seen(self, ratio: int, topk: int | None = None) -> float:
        """Mean over the tokens of the compressed rows each sees, of those at most `topk`."""
        first, last = self.context // ratio, (self.context + self.tokens) // ratio
        if topk is None or last <= topk:
            return (first + last) / 2
        climbing = max(topk - first, 0) / max(last - first, 1)  # part of the step below topk
        return climbing * (min(first, topk) + topk) / 2 + (1 - climbing) * topk

    def distinct(self, rows_per_token: float, ratio: int) -> float:
        """Rows of all caches that the step reads, each once."""
        if self.tokens == 1:
            return self.batch * rows_per_token
        return (self.context + self.tokens) / ratio


class Maker:
    """Seeded tensors on one device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed values."""
        x = torch.randn(*shape, generator=self._generator, device=self.device)
        return (x * scale).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator, device=self.device).to(
            dtype
        )

    def uniform(self, *shape: int) -> torch.Tensor:
        """Values in [0, 1)."""
        return torch.rand(*shape, generator=self._generator, device=self.device)

    def activation(self, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as `act_quant` leaves them."""
        return act_quant(self.normal(n, k), 128)

    def fp8(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight in blocks of 128 x 128, with its scales."""
        *front, n, k = shape
        weight = self.normal(*shape).to(formats.FP8)
        scale = self.integers(110, 118, *front, -(-n // 128), -(-k // 128), dtype=torch.uint8)
        return weight, scale.view(formats.E8M0)

    def fp4(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A packed weight in groups of 32, with its scales."""
        *front, n, k = shape
        weight = self.integers(-128, 128, *front, n, k // 2, dtype=torch.int8)
        scale = self.integers(110, 118, *front, n, k // 32, dtype=torch.uint8)
        return weight, scale.view(formats.E8M0)

    def lengths(self, work: Workload) -> dict[str, torch.Tensor]:
        """The step's `seq_lens` and `cu_seqlens`."""
        ends = [work.context + work.tokens] * work.batch
        cu = range(0, work.n + 1, work.tokens)
        return {
            "seq_lens": torch.tensor(ends, dtype=torch.int32, device=self.device),
            "cu_seqlens": torch.tensor(list(cu), dtype=torch.int32, device=self.device),
        }

    def cache(
        self, batch: int, n_rows: int, block_rows: int, width: int, record: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Filled storage for `batch` sequences of `n_rows`, its blocks shuffled, and its table."""
        blocks = n_rows // block_rows + 1
        storage = RECORDS[record].new_storage(batch * blocks, block_rows, width, self.device)
        total, piece = batch * blocks * block_rows, 1 << 18
        for begin in range(0, total, piece):
            end = min(begin + piece, total)
            slots = torch.arange(begin, end, device=self.device)
            store_rows(storage, self.normal(end - begin, width), slots, record)
        order = torch.randperm(batch * blocks, generator=self._generator, device=self.device)
        return storage, order.view(batch, blocks).int()
