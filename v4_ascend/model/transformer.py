"""The network: embedding, blocks of hyper-connected attention and experts, head, drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.batch import Batch, LayerCache
from v4_ascend.model.block import Block, Head, Mixer
from v4_ascend.model.dspark import DSpark, Guesses
from v4_ascend.model.linear import Source, read_plain
from v4_ascend.model.mtp import MTP
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard, rows_of, span_of

# Sees a layer's number and its output streams.
Observer = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Transformer:
    """A model, or the part of it that one rank runs.

    `caches` arguments hold one `LayerCache` for each layer here, those that draft last. `embed`
    is on the first stage, `head` on the last, and with it a drafter, MTP or DSpark, if one is
    wanted; it embeds tokens too.
    """

    config: ModelConfig
    numerics: Numerics
    shard: Shard
    embed: torch.Tensor | None
    layers: Sequence[Block]
    head: Head | None
    mtp: Sequence[MTP]
    dspark: DSpark | None

    @classmethod
    def read(
        cls,
        source: Source,
        config: ModelConfig,
        numerics: Numerics,
        *,
        with_drafter: bool,
        shard: Shard | None = None,
    ) -> Transformer:
        """Read every tensor the shard needs, each once, in the checkpoint's order."""
        if shard is None:
            shard = Shard.whole(config)
        first, end = shard.layers
        has_drafter = with_drafter and end == config.n_layers
        embeds = first == 0 or has_drafter
        embed = read_plain(source, "embed", numerics.dtype) if embeds else None
        layers = [
            Block.read(source, f"layers.{n}", config, n, numerics, shard) for n in range(first, end)
        ]
        head = None
        if end == config.n_layers:
            weight = read_plain(source, "head", torch.float32)
            norm = read_plain(source, "norm", torch.float32)
            head = Head(Mixer.read(source, "hc_head"), norm, weight, config, shard.tp)
        mtp, dspark = [], None
        if has_drafter and head is not None:
            of_drafter = (numerics, head.weight, shard)
            if config.dspark is not None:
                dspark = DSpark.read(source, config, config.dspark, *of_drafter)
            else:
                mtp = [MTP.read(source, n, config, *of_drafter) for n in range(config.n_mtp_layers)]
        return cls(config, numerics, shard, embed, layers, head, mtp, dspark)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up, [n] to [n, dim]; TP ranks have a part of the vocabulary each.

        Raises:
            ValueError: this is not the first stage, and does not draft.
        """
        if self.embed is None:
            raise ValueError("only the first stage embeds, and one that drafts")
        tp = self.shard.tp
        if tp.size == 1:
            return F.embedding(ids, self.embed)
        n = len(self.embed)
        local = ids - tp.rank * n
        is_here = (local >= 0) & (local < n)
        rows = self.embed[local.clamp(0, n - 1)].masked_fill(~is_here.unsqueeze(-1), 0)
        return tp.all_reduce(rows)

    @property
    def cached_layers(self) -> tuple[int, int]:
        """Layers that need caches, half-open: the drafter's follow the network's."""
        first, end = self.shard.layers
        return first, end + (len(self.dspark.stages) if self.dspark else len(self.mtp))

    def own(self, batch: Batch) -> Batch:
        """Return the tokens of a step that are this CP rank's."""
        cp = self.shard.cp
        return batch if cp.size == 1 else batch.tokens(*span_of(batch.n_tokens, cp))

    def __call__(
        self,
        batch: Batch | None,
        caches: Sequence[LayerCache],
        observe: Observer | None = None,
        *,
        streams: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one step; return the streams [n_own, hc_mult, dim] after the last block here.

        `streams` come from the stage before; without them tokens are embedded. A `batch` of None
        has no tokens: the rank only serves its experts.
        """
        own = self.own(batch) if batch is not None else None
        if streams is not None:
            x = streams
        elif own is not None:
            x = self.embedded(own.input_ids).unsqueeze(1)
            x = x.expand(-1, self.config.hc_mult, -1).contiguous()
        else:
            x = self.no_streams()
        for layer, block in enumerate(self.layers):
            x = block(x, batch, own, caches[layer])
            if observe is not None:
                observe(self.shard.layers[0] + layer, x)
        return x

    def no_streams(self) -> torch.Tensor:
        """Return the streams of no token."""
        c, device = self.config, self.layers[0].attn_norm.device
        return torch.empty(0, c.hc_mult, c.dim, dtype=self.numerics.dtype, device=device)

    def logits(self, streams: torch.Tensor) -> torch.Tensor:
        """Project streams [n, hc_mult, dim] to fp32 logits [n, vocab_size].

        Raises:
            ValueError: this is not the last stage.
        """
        if self.head is None:
            raise ValueError("only the last stage has the head")
        return self.head(streams)

    def draft(
        self,
        x: torch.Tensor,
        next_ids: torch.Tensor,
        batch: Batch | None,
        caches: Sequence[LayerCache],
        rows: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the token after the next one by MTP: streams and logits of some of the tokens.

        A `batch` of None has no tokens: the rank only serves the drafter's experts.

        Shapes:
            x         [n_own, hc_mult, dim]: streams of this step, as `__call__` returned them
            next_ids  [n_tokens]  int64: the token that follows each one
            rows      of tokens, in ascending order
            return    [len(rows), hc_mult, dim], and [len(rows), vocab_size] fp32
        """
        mtp, own, n = self.mtp[0], None, 0
        if batch is not None:
            own, n = self.own(batch), batch.n_tokens
        first, end = span_of(n, self.shard.cp)
        embedded = self.embedded(next_ids[first:end])
        x = mtp(x, embedded, batch, own, caches[len(self.layers)])
        x = rows_of(x, rows, n, self.shard.cp)
        return x, mtp.head(x)

    def draft_blocks(self, block: Batch | None, caches: Sequence[LayerCache]) -> Guesses:
        """Guess a block of tokens for each sequence of `block` by DSpark.

        `DSpark.take` has seen all that comes before it. A `block` of None has no tokens.

        Raises:
            ValueError: there is no DSpark here.
        """
        if self.dspark is None:
            raise ValueError("only DSpark drafts blocks")
        own = self.own(block) if block is not None else None
        x = self.embedded(own.input_ids) if own is not None else self.no_streams()[:, 0]
        return self.dspark(x, block, own, caches[len(self.layers) :])
