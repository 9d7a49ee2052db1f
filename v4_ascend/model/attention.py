"""Hybrid attention: a window of tokens, and compressed rows behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.batch import Batch, LayerCache
from v4_ascend.model.compressor import Compressor, Indexer
from v4_ascend.model.linear import Int8Rows, Linear, Source, read_plain, read_wide
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard, gathered, span_of, to_heads, to_tokens
from v4_ascend.ops import (
    fp8_round_trip,
    head_rms_norm,
    heads_gemm,
    rms_norm,
    rms_norm_int8,
    rope,
    rope_inverse,
    sparse_attn,
    store_rows,
)
from v4_ascend.ops.records import KV_GROUP


@dataclass(frozen=True)
class Attention:
    """One layer's attention; `compress_ratio` 0 is SWA, 4 CSA, 128 HCA.

    Shapes:
        wo_a  [o_groups, o_lora_rank, group_dim], widened: its input is never quantised
    """

    wq_a: Linear
    q_norm: torch.Tensor
    wq_b: Linear
    wkv: Linear
    kv_norm: torch.Tensor
    wo_a: torch.Tensor
    wo_b: Linear
    sink: torch.Tensor
    compressor: Compressor | None
    indexer: Indexer | None
    config: ModelConfig
    compress_ratio: int
    cache_sim: bool
    shard: Shard

    @classmethod
    def read(
        cls,
        source: Source,
        at: str,
        config: ModelConfig,
        ratio: int,
        numerics: Numerics,
        shard: Shard,
    ) -> Attention:
        """Read ``at.*``."""
        wo_a = read_wide(source, f"{at}.wo_a", numerics)
        has_rows, has_index = ratio > 0, ratio == 4
        attention = cls(
            wq_a=Linear.read(source, f"{at}.wq_a", numerics),
            q_norm=read_plain(source, f"{at}.q_norm", torch.float32),
            wq_b=Linear.read(source, f"{at}.wq_b", numerics),
            wkv=Linear.read(source, f"{at}.wkv", numerics),
            kv_norm=read_plain(source, f"{at}.kv_norm", torch.float32),
            wo_a=wo_a.unflatten(0, (-1, config.o_lora_rank)),
            wo_b=Linear.read(source, f"{at}.wo_b", numerics),
            sink=source(f"{at}.attn_sink").float(),
            compressor=Compressor.read(source, f"{at}.compressor", ratio, config.norm_eps)
            if has_rows
            else None,
            indexer=Indexer.read(source, f"{at}.indexer", config, ratio, numerics)
            if has_index
            else None,
            config=config,
            compress_ratio=ratio,
            cache_sim=numerics.cache_sim,
            shard=shard,
        )
        if attention._norms_to_int8:
            rms_norm_int8.prepare(attention.q_norm)
        return attention

    def __call__(
        self, x: torch.Tensor, batch: Batch, own: Batch, cache: LayerCache
    ) -> torch.Tensor:
        """Attend from [n_own, dim] to [n_own, dim], writing this step's rows first.

        `own` has the tokens of `x`; `batch` has those of all CP ranks, whose rows are written.
        """
        everyone = gathered(x, batch.n_tokens, self.shard.cp)
        self.write(everyone, batch, cache)
        qr = self._low_rank(x)
        q = self.wq_b(qr).unflatten(-1, (-1, self.config.head_dim))
        if not self.shard.dsa_cp:
            o = self._attend(q, x, qr, everyone, batch, own, cache)
        else:
            tp = self.shard.tp
            first, end = span_of(len(x), tp)
            q, mine = to_tokens(q, tp), own.tokens(first, end)
            o = self._attend(q, x[first:end], qr[first:end], everyone, batch, mine, cache)
            o = to_heads(o, len(x), tp)
        o = o.flatten(1).unflatten(1, (self.wo_a.shape[0], -1))
        z = heads_gemm(o, self.wo_a)
        return self.shard.tp.all_reduce(self.wo_b(z.flatten(1)))

    @property
    def _norms_to_int8(self) -> bool:
        """Whether the query's norm feeds nothing but INT8 products."""
        return self.wq_b.is_int8 and (self.indexer is None or self.indexer.wq_b.is_int8)

    def _low_rank(self, x: torch.Tensor) -> torch.Tensor | Int8Rows:
        """Return the normed rows that `wq_b` and the indexer's multiply."""
        args = self.wq_a(x), self.q_norm, self.config.norm_eps
        return Int8Rows(*rms_norm_int8(*args)) if self._norms_to_int8 else rms_norm(*args)

    def write(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> None:
        """Write the window's rows, and the compressed ones this step completes."""
        cos, sin = batch.compress_rope if self.compress_ratio else batch.rope
        kv = rope(rms_norm(self.wkv(x), self.kv_norm, self.config.norm_eps), cos, sin)
        store_rows(cache.window, self._stored(kv), batch.window_slot_mapping, cache.kv_record)
        if self.compressor is None:
            return
        if cache.compressed is None or cache.state is None:
            raise ValueError("a compressing layer's cache needs compressed and state")
        rows = batch.compressed[self.compress_ratio]
        kv = self._stored(self.compressor(x, batch, cache.state))
        store_rows(cache.compressed, kv, rows.slot_mapping, cache.kv_record)

    def _attend(
        self,
        q: torch.Tensor,
        x: torch.Tensor,
        qr: torch.Tensor | Int8Rows,
        everyone: torch.Tensor,
        batch: Batch,
        own: Batch,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Attend from the queries of `own`, [n_own, n_heads, head_dim]."""
        c = self.config
        cos, sin = own.compress_rope if self.compress_ratio else own.rope
        indices = None
        if self.indexer is not None:
            self.indexer.write(everyone, batch, cache)
            indices = self.indexer(x, qr, own, cache) if len(x) else None
        if not len(x):
            return q
        q = rope(head_rms_norm(q, c.norm_eps), cos, sin)
        rows = own.compressed[self.compress_ratio] if self.compress_ratio else None
        o = sparse_attn(
            q,
            cache.window,
            own.window_block_table,
            cache.compressed,
            rows.block_table if rows else None,
            indices,
            cache.kv_record,
            own.seq_lens,
            own.cu_seqlens,
            self.sink,
            c.head_dim**-0.5,
            c.window_size,
            self.compress_ratio,
        )
        return rope_inverse(o, cos, sin)

    def _stored(self, kv: torch.Tensor) -> torch.Tensor:
        """Round what is not rotated to FP8, as the model was trained."""
        if not self.cache_sim:
            return kv
        return fp8_round_trip(kv, KV_GROUP, self.config.rope_head_dim)
