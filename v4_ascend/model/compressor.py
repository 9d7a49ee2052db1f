"""Compression of one layer's keys, and the indexer that chooses among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.batch import Batch, LayerCache
from v4_ascend.model.linear import Int8Rows, Linear, Source, read_plain
from v4_ascend.model.numerics import Numerics
from v4_ascend.ops import (
    compress_kv,
    fp4_round_trip,
    hadamard,
    index_select,
    linear,
    rope,
    store_rows,
)
from v4_ascend.ops.records import INDEX_FP4_GROUP


@dataclass(frozen=True)
class Compressor:
    """The learned pooling of `compress_ratio` tokens into one row.

    Shapes: as `compress_kv`.
    """

    wkv: torch.Tensor
    wgate: torch.Tensor
    ape: torch.Tensor
    norm: torch.Tensor
    compress_ratio: int
    norm_eps: float

    @classmethod
    def read(cls, source: Source, at: str, ratio: int, norm_eps: float) -> Compressor:
        """Read ``at.*``; everything is widened to fp32, as the published code does."""
        fp32 = torch.float32
        wkv = read_plain(source, f"{at}.wkv", fp32)
        wgate = read_plain(source, f"{at}.wgate", fp32)
        norm = read_plain(source, f"{at}.norm", fp32)
        compress_kv.prepare(wkv, wgate, norm)
        return cls(
            wkv=wkv,
            wgate=wgate,
            ape=source(f"{at}.ape").to(fp32),
            norm=norm,
            compress_ratio=ratio,
            norm_eps=norm_eps,
        )

    def __call__(self, x: torch.Tensor, batch: Batch, state: torch.Tensor) -> torch.Tensor:
        """Return the rows this step completes, [max_rows, head_dim]."""
        rows = batch.compressed[self.compress_ratio]
        return compress_kv(
            x,
            self.wkv,
            self.wgate,
            self.ape,
            self.norm,
            rows.cos,
            rows.sin,
            state,
            batch.state_slots,
            batch.seq_lens,
            batch.cu_seqlens,
            self.compress_ratio,
            self.norm_eps,
        )[0]


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer of a CSA layer."""

    wq_b: Linear
    weights_proj: torch.Tensor
    compressor: Compressor
    n_heads: int
    head_dim: int
    topk: int
    cache_sim: bool

    @classmethod
    def read(
        cls, source: Source, at: str, config: ModelConfig, ratio: int, numerics: Numerics
    ) -> Indexer:
        """Read ``at.*``."""
        return cls(
            wq_b=Linear.read(source, f"{at}.wq_b", numerics),
            weights_proj=read_plain(source, f"{at}.weights_proj", numerics.dtype),
            compressor=Compressor.read(source, f"{at}.compressor", ratio, config.norm_eps),
            n_heads=config.index_n_heads,
            head_dim=config.index_head_dim,
            topk=config.index_topk,
            cache_sim=numerics.cache_sim,
        )

    def write(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> None:
        """Write the keys this step completes."""
        if cache.index is None or cache.index_state is None:
            raise ValueError("a CSA layer's cache needs index and index_state")
        rows = batch.compressed[self.compressor.compress_ratio]
        keys = self._rotated(self.compressor(x, batch, cache.index_state))
        store_rows(cache.index, keys, rows.slot_mapping, cache.index_record)

    def __call__(
        self, x: torch.Tensor, qr: torch.Tensor | Int8Rows, batch: Batch, cache: LayerCache
    ) -> torch.Tensor | None:
        """Choose rows for every token, [n_tokens, topk]; None where all visible ones fit."""
        if cache.index is None:
            raise ValueError("a CSA layer's cache needs index")
        ratio = self.compressor.compress_ratio
        rows = batch.compressed[ratio]
        if rows.max_visible <= self.topk:
            return None
        q = self.wq_b(qr).unflatten(-1, (self.n_heads, self.head_dim))
        q = self._rotated(rope(q, *batch.compress_rope))
        weights = linear(x, self.weights_proj) * (self.head_dim**-0.5 * self.n_heads**-0.5)
        return index_select(
            q,
            weights,
            cache.index,
            cache.index_record,
            rows.block_table,
            batch.seq_lens,
            batch.cu_seqlens,
            ratio,
            self.topk,
        )

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate and round to FP4; without rounding the rotation would change nothing."""
        return fp4_round_trip(hadamard(x), INDEX_FP4_GROUP) if self.cache_sim else x
