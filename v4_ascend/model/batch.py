"""What one step works on: a ragged batch, and where its rows go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CompressedRows:
    """The rows of one compress ratio: where old ones are, where new ones go.

    Shapes (max_rows as in `compress_kv`):
        block_table   [batch, max_blocks]  int32
        slot_mapping  [max_rows]  int64, -1 behind the rows this step completes
        cos, sin      [max_rows, pairs]  fp32, at each new row's position
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    max_visible: int  # the most rows any token of the step sees


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step over several sequences, tokens of each consecutive.

    Shapes:
        input_ids            [n_tokens]  int64
        seq_lens             [batch]  int32, including this step; cu_seqlens [batch + 1] int32
        state_slots          [batch]  int64
        window_block_table   [batch, max_blocks]  int32
        window_slot_mapping  [n_tokens]  int64
        rope, compress_rope  cos and sin [n_tokens, pairs] fp32: for SWA layers, for the others
    """

    input_ids: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens: torch.Tensor
    state_slots: torch.Tensor
    window_block_table: torch.Tensor
    window_slot_mapping: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    compress_rope: tuple[torch.Tensor, torch.Tensor]
    compressed: Mapping[int, CompressedRows]

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self.input_ids)

    def tokens(self, first: int, end: int) -> Batch:
        """Return the queries of tokens [first, end); caches are addressed as before.

        A sequence that ends behind `end` is as long as its last token here; one that has no
        token here keeps an empty span.
        """
        cu = self.cu_seqlens.clamp(first, end) - first
        behind = (self.cu_seqlens[1:] - end).clamp(min=0)
        seq_lens = self.seq_lens - torch.minimum(behind, self.cu_seqlens.diff())
        return replace(
            self,
            input_ids=self.input_ids[first:end],
            seq_lens=seq_lens,
            cu_seqlens=cu,
            window_slot_mapping=self.window_slot_mapping[first:end],
            rope=_slice(self.rope, first, end),
            compress_rope=_slice(self.compress_rope, first, end),
        )


def _slice(
    x: tuple[torch.Tensor, torch.Tensor], first: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return x[0][first:end], x[1][first:end]


def to_device(value: T, device: torch.device | str) -> T:
    """Copy a step's tensors, however nested, to the device that runs it."""
    moved: Any = value
    if isinstance(value, torch.Tensor):
        moved = value.to(device)
    elif isinstance(value, tuple):
        moved = tuple(to_device(v, device) for v in value)
    elif isinstance(value, Mapping):
        moved = {k: to_device(v, device) for k, v in value.items()}
    elif isinstance(value, (Batch, CompressedRows)):
        parts = {f.name: to_device(getattr(value, f.name), device) for f in fields(value)}
        moved = replace(value, **parts)
    return moved


def overwrite(target: Any, source: Any) -> None:
    """Fill the tensors of one step with those of another of the same shapes.

    Raises:
        ValueError: they have other shapes.
    """
    if isinstance(target, torch.Tensor):
        if target.shape != source.shape:
            raise ValueError(f"{list(source.shape)} into {list(target.shape)}")
        target.copy_(source, non_blocking=True)
    elif isinstance(target, tuple):
        for t, s in zip(target, source, strict=True):
            overwrite(t, s)
    elif isinstance(target, Mapping):
        for key in target:
            overwrite(target[key], source[key])
    elif isinstance(target, (Batch, CompressedRows)):
        for f in fields(target):
            overwrite(getattr(target, f.name), getattr(source, f.name))


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's storages; `kv_record` and `index_record` name their row formats.

    Shapes: window, compressed, index as `ops.records`; states as `compress_kv`.
    """

    kv_record: str
    index_record: str
    window: torch.Tensor
    compressed: torch.Tensor | None = None
    state: torch.Tensor | None = None
    index: torch.Tensor | None = None
    index_state: torch.Tensor | None = None
