"""Caches of a fixed number of sequences, and the batches that address them.

Storages are allocated once. A slot has its own window ring and compressor states; pages of
compressed rows are given to it from a pool that all slots share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.batch import Batch, CompressedRows, LayerCache, to_device
from v4_ascend.ops import new_rows
from v4_ascend.ops.compress_kv import state_rows
from v4_ascend.ops.op import BACKEND_OF_DEVICE
from v4_ascend.ops.ragged import locate, max_new_rows
from v4_ascend.ops.records import RECORDS
from v4_ascend.ops.rope import rope_freqs, rope_table
from v4_ascend.runtime.snapshots import Snapshots
from v4_ascend.supernode.cache import BLOCK_TOKENS, page_tokens

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one sequence: `start` of its tokens are in the slot's caches."""

    slot: int
    token_ids: Sequence[int]
    start: int


class KVCache:
    """Storages for `n_slots` sequences of up to `max_model_len` tokens.

    They are of every layer of the network, its drafter's last, or of `layers` (half-open), those
    of a stage.
    `max_chunk` is the most tokens of one sequence a step may bring: a window ring must
    hold them beside the window before. There are `n_pages` pages of `page_tokens`, by default
    enough for all slots, which then have their own; `place` gives them others. A snapshot has
    what a slot needs at the end of a page beside its pages. A step may bring up to `n_drafts`
    guesses for a sequence, which end no block: what is behind wrong ones is written again.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        n_slots: int,
        max_model_len: int,
        max_chunk: int,
        kv_record: str,
        index_record: str,
        device: torch.device | str = "cpu",
        min_page_rows: int = 1,
        layers: tuple[int, int] | None = None,
        n_pages: int | None = None,
        n_snapshots: int = 0,
        n_drafts: int = 0,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.n_slots, self.max_model_len, self.max_chunk = n_slots, max_model_len, max_chunk
        self.min_page_rows, self.n_drafts = min_page_rows, n_drafts
        layers = layers or (0, len(config.compress_ratios))
        ahead = 0
        if layers[1] > config.n_layers:  # a drafter goes on behind the last token
            ahead = config.dspark.block_size if config.dspark else max(0, n_drafts - 1)
        self.n_blocks = -(-(max_model_len + ahead) // BLOCK_TOKENS)
        ring = (max_chunk + config.window_size - 2) // BLOCK_TOKENS + 2
        self.ring_blocks = min(ring, self.n_blocks)
        self.page_tokens = page_tokens(min_page_rows)
        self._max_pages = -(-max_model_len // self.page_tokens)
        self.n_pages = n_slots * self._max_pages if n_pages is None else n_pages
        if self.n_pages < self._max_pages:
            raise ValueError(
                f"{self.n_pages} pages of {self.page_tokens} tokens; a request of max_model_len "
                f"({max_model_len}) needs {self._max_pages}"
            )
        own = torch.arange(n_slots * self._max_pages, dtype=torch.int32) % self.n_pages
        self._pages = own.view(n_slots, self._max_pages)
        self.n_placed = 0  # how often that changed
        ratios = config.compress_ratios[slice(*layers)]
        self.layers = [self._layer(ratio, kv_record, index_record) for ratio in ratios]
        self._snapshots = Snapshots.of(self.layers, n_snapshots)

    def _layer(self, ratio: int, kv_record: str, index_record: str) -> LayerCache:
        c = self.config
        kv, index = RECORDS[kv_record], RECORDS[index_record]
        n_ring = self.n_slots * self.ring_blocks
        window = kv.new_storage(n_ring, BLOCK_TOKENS, c.head_dim, self.device)
        if not ratio:
            return LayerCache(kv_record=kv_record, index_record=index_record, window=window)
        n_blocks, rows = self.n_pages * self._blocks_per_page(ratio), self.block_rows(ratio)
        has_index = ratio == 4
        return LayerCache(
            kv_record=kv_record,
            index_record=index_record,
            window=window,
            compressed=kv.new_storage(n_blocks, rows, c.head_dim, self.device),
            state=self._state(ratio, c.head_dim),
            index=index.new_storage(n_blocks, rows, c.index_head_dim, self.device)
            if has_index
            else None,
            index_state=self._state(ratio, c.index_head_dim) if has_index else None,
        )

    def block_rows(self, ratio: int) -> int:
        """Return how many compressed rows a block has."""
        return max(BLOCK_TOKENS // ratio, self.min_page_rows)

    def _blocks_per_page(self, ratio: int) -> int:
        return self.page_tokens // (self.block_rows(ratio) * ratio)

    def _state(self, ratio: int, head_dim: int) -> torch.Tensor:
        overlaps = ratio == 4
        width = 2 * head_dim * (2 if overlaps else 1)
        rows = state_rows(ratio, overlaps, self.n_drafts)
        return torch.zeros(self.n_slots, rows, width, device=self.device)

    @cached_property
    def freqs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles a position: of SWA layers, and of the others."""
        c = self.config
        yarn = {"factor": c.rope_factor, "beta_fast": c.beta_fast, "beta_slow": c.beta_slow}
        return rope_freqs(c.rope_head_dim, c.rope_theta), rope_freqs(
            c.rope_head_dim, c.compress_rope_theta, original_seq_len=c.original_seq_len, **yarn
        )

    def place(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Give a slot pages, from its page number `first` on."""
        self.n_placed += 1
        self._pages[slot, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def save(self, slot: int, n_tokens: int, snapshot: int) -> None:
        """Keep what the slot has beside its pages, which end after `n_tokens`."""
        self._snapshots.save(self.ring_block(slot, n_tokens - 1), slot, snapshot)

    def restore(self, slot: int, n_tokens: int, snapshot: int) -> None:
        """Put back what was kept at the end of a prefix of `n_tokens`."""
        self._snapshots.restore(self.ring_block(slot, n_tokens - 1), slot, snapshot)

    def ring_block(self, slot: int, position: int) -> int:
        """Return the block of a slot's window ring that holds a position."""
        return slot * self.ring_blocks + position // BLOCK_TOKENS % self.ring_blocks

    @cached_property
    def rings(self) -> torch.Tensor:
        """Block tables of all slots' window rings."""
        slots = torch.arange(self.n_slots, dtype=torch.int32).unsqueeze(1)
        block = torch.arange(self.n_blocks, dtype=torch.int32)
        return slots * self.ring_blocks + block % self.ring_blocks

    def table(self, ratio: int, slots: torch.Tensor) -> torch.Tensor:
        """Block tables of some slots' compressed rows."""
        n = self._blocks_per_page(ratio)
        blocks = self._pages[slots].unsqueeze(-1) * n + torch.arange(n, dtype=torch.int32)
        return blocks.flatten(1)

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """Lay out one step on the device.

        Raises: as `layout`.
        """
        if self.device.type == "cpu":
            return self.layout(chunks)
        if not self._device_places:
            return to_device(self.layout(chunks), self.device)
        tokens = self._tokens(chunks)
        batch = to_device(tokens, self.device)
        return replace(batch, compressed=self._rows(tokens, batch, self._device_freqs, new_rows))

    def layout(self, chunks: Sequence[Chunk]) -> Batch:
        """Lay out one step on the host.

        Raises:
            ValueError: a chunk is longer than max_chunk or ends behind max_model_len.
        """
        tokens = self._tokens(chunks)
        rows = self._rows(tokens, tokens, self.freqs[1], new_rows.reference)
        return replace(tokens, compressed=rows)

    def require_room(self, chunks: Sequence[Chunk]) -> None:
        """Require that chunks fit their sequences' caches.

        Raises:
            ValueError: a chunk is longer than max_chunk or ends behind max_model_len.
        """
        for chunk in chunks:
            stop = chunk.start + len(chunk.token_ids)
            if len(chunk.token_ids) > self.max_chunk or stop > self.max_model_len:
                raise ValueError(
                    f"slot {chunk.slot}: tokens {chunk.start}..{stop} must be at most "
                    f"{self.max_chunk} and end by {self.max_model_len}"
                )

    def _tokens(self, chunks: Sequence[Chunk]) -> Batch:
        """Lay out a step's tokens, without the rows they complete."""
        self.require_room(chunks)
        slots = torch.tensor([c.slot for c in chunks])
        seq_lens = torch.tensor([c.start + len(c.token_ids) for c in chunks], dtype=torch.int32)
        counts = torch.tensor([len(c.token_ids) for c in chunks])
        cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int()
        request, position = locate(seq_lens, cu_seqlens)
        ring = self.rings[slots]
        swa, compress = self.freqs
        block = ring[request, position // BLOCK_TOKENS].long()
        return Batch(
            input_ids=torch.tensor([t for c in chunks for t in c.token_ids]),
            seq_lens=seq_lens,
            cu_seqlens=cu_seqlens,
            state_slots=slots,
            window_block_table=ring,
            window_slot_mapping=block * BLOCK_TOKENS + position % BLOCK_TOKENS,
            rope=rope_table(position, swa),
            compress_rope=rope_table(position, compress),
            compressed={},
        )

    def block(
        self, slots: Sequence[int], starts: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> Batch:
        """Lay out the block a drafter guesses from for each slot, from position `starts` on.

        Each token is a request of its own that ends with the block: it sees all of the block, and
        the window before that. The rows are written again once their tokens are known.
        """
        n, size = len(ids), len(ids[0])
        table = self.rings[torch.tensor(slots)].repeat_interleave(size, 0)
        first = torch.tensor(starts).repeat_interleave(size)
        position = first + torch.arange(size).repeat(n)
        block = table.gather(1, (position // BLOCK_TOKENS).unsqueeze(1)).squeeze(1).long()
        turns = rope_table(position, self.freqs[0])
        batch = Batch(
            input_ids=torch.tensor(ids).flatten(),
            seq_lens=(first + size).int(),
            cu_seqlens=torch.arange(n * size + 1, dtype=torch.int32),
            state_slots=torch.tensor(slots).repeat_interleave(size),
            window_block_table=table,
            window_slot_mapping=block * BLOCK_TOKENS + position % BLOCK_TOKENS,
            rope=turns,
            compress_rope=turns,
            compressed={},
        )
        return batch if self.device.type == "cpu" else to_device(batch, self.device)

    @cached_property
    def _device_freqs(self) -> torch.Tensor:
        return self.freqs[1].to(self.device)

    @property
    def _device_places(self) -> bool:
        """Whether the device has a kernel that lays out rows; else the host knows all lengths."""
        backend = BACKEND_OF_DEVICE.get(self.device.type, self.device.type)
        return any(kernel.provider != "torch" for kernel in new_rows.tried(backend))

    def _rows(
        self, on_host: Batch, batch: Batch, freqs: torch.Tensor, place: Callable[..., Rows]
    ) -> dict[int, CompressedRows]:
        """Lay out the rows a step completes where `batch` lies, which `on_host` is a copy of."""
        longest = int(on_host.seq_lens.max())
        made = {}
        for ratio in sorted(set(self.config.compress_ratios) - {0}):
            table = self.table(ratio, on_host.state_slots).to(freqs.device)
            most = max_new_rows(batch.n_tokens, len(batch.seq_lens), ratio)
            lengths = (batch.seq_lens, batch.cu_seqlens)
            cos, sin, slots = place(freqs, *lengths, table, self.block_rows(ratio), ratio, most)
            made[ratio] = CompressedRows(
                block_table=table,
                slot_mapping=slots,
                cos=cos,
                sin=sin,
                max_visible=longest // ratio,
            )
        return made
