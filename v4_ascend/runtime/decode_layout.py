"""A captured step laid out anew in place, on the host that runs it.

What `KVCache.layout` makes by some sixty small calls of torch, each of whose code a streaming
model has evicted from the processor's caches, is here mostly written as single integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from v4_ascend.model.batch import Batch, CompressedRows
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.supernode.cache import BLOCK_TOKENS


class DecodeLayout:
    """Overwrites a batch of sequences with one token each, which a `KVCache` on a CPU laid out."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self._cache, self._batch = cache, batch
        self._ids, self._lens, self._slots, self._window = map(
            _view, (batch.input_ids, batch.seq_lens, batch.state_slots, batch.window_slot_mapping)
        )
        self._rows = [_Rows(cache, ratio, rows) for ratio, rows in batch.compressed.items()]
        self._position = torch.empty(batch.n_tokens, 1)
        self._positions = _view(self._position)
        self._placed: tuple[Any, ...] = ()

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Lay out these chunks, as many as the batch has sequences.

        Raises:
            ValueError: a chunk ends behind max_model_len.
        """
        cache, batch = self._cache, self._batch
        cache.require_room(chunks)
        slots = tuple(c.slot for c in chunks)
        if self._placed != (slots, cache.n_placed):
            self._placed = (slots, cache.n_placed)
            self._slots[:] = slots
            batch.window_block_table.copy_(cache.rings[batch.state_slots])
            for rows in self._rows:
                rows.table.copy_(cache.table(rows.ratio, batch.state_slots))
        for i, chunk in enumerate(chunks):
            position = chunk.start
            self._ids[i], self._lens[i] = chunk.token_ids[0], position + 1
            block = cache.ring_block(chunk.slot, position)
            self._window[i] = block * BLOCK_TOKENS + position % BLOCK_TOKENS
            self._positions[i] = position
        swa, compress = cache.freqs
        _turn(self._position, swa, batch.rope)
        _turn(self._position, compress, batch.compress_rope)
        for rows in self._rows:
            rows.fill(chunks, compress)


class _Rows:
    """The rows of one compress ratio that a step completes."""

    def __init__(self, cache: KVCache, ratio: int, rows: CompressedRows) -> None:
        self.ratio, self.table = ratio, rows.block_table
        self._block_rows = cache.block_rows(ratio)
        self._blocks, self._mapping = _view(rows.block_table), _view(rows.slot_mapping)
        self._turns, self._start = (rows.cos, rows.sin), torch.empty(len(rows.cos), 1)
        self._starts = _view(self._start)
        self._n_before = -1  # rows the step before completed; not known of the first

    def fill(self, chunks: Sequence[Chunk], freqs: torch.Tensor) -> None:
        n = 0
        for i, chunk in enumerate(chunks):
            if (chunk.start + 1) % self.ratio:
                continue
            block, within = divmod(chunk.start // self.ratio, self._block_rows)
            self._mapping[n] = int(self._blocks[i, block]) * self._block_rows + within
            self._starts[n] = chunk.start + 1 - self.ratio
            n += 1
        if n == self._n_before == 0:
            return
        self._mapping[n:], self._n_before = -1, n
        self._starts[n:] = 0  # turned by nothing
        _turn(self._start, freqs, self._turns)


def _view(x: torch.Tensor) -> Any:
    """Return the tensor's memory as an array, whose items are written without torch."""
    return x.numpy()


def _turn(
    position: torch.Tensor, freqs: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Fill `out` with what `rope_table` makes of these positions."""
    angle = position * freqs
    torch.cos(angle, out=out[0])
    torch.sin(angle, out=out[1])
