"""The network: embedding, blocks of hyper-connected attention and experts, head, MTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.attention import Attention
from v4_ascend.model.batch import Batch, LayerCache
from v4_ascend.model.linear import Linear, Source, read_plain
from v4_ascend.model.moe import MoE
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard, span_of
from v4_ascend.ops import Group, hc_head, hc_post, hc_pre, rms_norm

# Sees a layer's number and its output streams.
Observer = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Mixer:
    """The learned mixing of one hyper-connection."""

    fn: torch.Tensor
    scale: torch.Tensor
    base: torch.Tensor

    @classmethod
    def read(cls, source: Source, at: str) -> Mixer:
        """Read ``at_fn``, ``at_scale`` and ``at_base``."""
        return cls(*(source(f"{at}_{part}").float() for part in ("fn", "scale", "base")))


@dataclass(frozen=True)
class Block:
    """One layer: attention, then experts, each inside a hyper-connection."""

    attn_norm: torch.Tensor
    ffn_norm: torch.Tensor
    hc_attn: Mixer
    hc_ffn: Mixer
    attn: Attention
    ffn: MoE
    config: ModelConfig

    @classmethod
    def read(
        cls,
        source: Source,
        at: str,
        config: ModelConfig,
        layer: int,
        numerics: Numerics,
        shard: Shard,
    ) -> Block:
        """Read ``at.*``, layer `layer` of the configuration; MTP layers follow the main ones."""
        is_hash = layer < config.n_hash_layers
        ratio = config.compress_ratios[layer]
        return cls(
            attn_norm=read_plain(source, f"{at}.attn_norm", torch.float32),
            ffn_norm=read_plain(source, f"{at}.ffn_norm", torch.float32),
            hc_attn=Mixer.read(source, f"{at}.hc_attn"),
            hc_ffn=Mixer.read(source, f"{at}.hc_ffn"),
            attn=Attention.read(source, f"{at}.attn", config, ratio, numerics, shard),
            ffn=MoE.read(
                source, f"{at}.ffn", config, numerics, shard.placed(layer), shard, is_hash=is_hash
            ),
            config=config,
        )

    def __call__(
        self, x: torch.Tensor, batch: Batch | None, own: Batch | None, cache: LayerCache
    ) -> torch.Tensor:
        """Run streams [n_own, hc_mult, dim] through the layer.

        `own` has the tokens of `x`, `batch` those of all CP ranks. Without tokens there is nothing
        to attend from, but other ranks' tokens may come to this rank's experts.
        """
        if batch is not None and own is not None:
            u, post, comb = self._pre(x, self.hc_attn)
            u = rms_norm(u, self.attn_norm, self.config.norm_eps)
            x = hc_post(self.attn(u, batch, own, cache), x, post, comb)
            input_ids = own.input_ids
        else:
            input_ids = torch.empty(0, dtype=torch.int64, device=x.device)
        u, post, comb = self._pre(x, self.hc_ffn)
        u = rms_norm(u, self.ffn_norm, self.config.norm_eps)
        return hc_post(self.ffn(u, input_ids), x, post, comb)

    def _pre(
        self, x: torch.Tensor, mixer: Mixer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        c = self.config
        eps = (c.norm_eps, c.hc_eps)
        return hc_pre(x, mixer.fn, mixer.scale, mixer.base, *eps, c.hc_sinkhorn_iters)


@dataclass(frozen=True)
class Head:
    """Streams to logits: collapse, norm, project in fp32; TP ranks have a part of the words."""

    hc: Mixer
    norm: torch.Tensor
    weight: torch.Tensor
    config: ModelConfig
    tp: Group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Project [n, hc_mult, dim] to fp32 logits [n, vocab_size]."""
        c = self.config
        y = hc_head(x, self.hc.fn, self.hc.scale, self.hc.base, c.norm_eps, c.hc_eps)
        logits = F.linear(rms_norm(y, self.norm, c.norm_eps).float(), self.weight)
        if self.tp.size == 1:
            return logits
        return torch.cat(list(self.tp.all_gather(logits, [len(x)] * self.tp.size)), dim=-1)


@dataclass(frozen=True)
class MTP:
    """The multi-token-prediction module: one more block, on the next token's embedding."""

    e_proj: Linear
    h_proj: Linear
    enorm: torch.Tensor
    hnorm: torch.Tensor
    block: Block
    head: Head

    @classmethod
    def read(
        cls,
        source: Source,
        stage: int,
        config: ModelConfig,
        numerics: Numerics,
        head: torch.Tensor,
        shard: Shard,
    ) -> MTP:
        """Read ``mtp.stage.*``; embedding and output projection are the main model's."""
        at = f"mtp.{stage}"
        return cls(
            e_proj=Linear.read(source, f"{at}.e_proj", numerics),
            h_proj=Linear.read(source, f"{at}.h_proj", numerics),
            enorm=read_plain(source, f"{at}.enorm", torch.float32),
            hnorm=read_plain(source, f"{at}.hnorm", torch.float32),
            block=Block.read(source, at, config, config.n_layers + stage, numerics, shard),
            head=Head(
                norm=read_plain(source, f"{at}.norm", torch.float32),
                hc=Mixer.read(source, f"{at}.hc_head"),
                weight=head,
                config=config,
                tp=shard.tp,
            ),
        )


@dataclass(frozen=True)
class Transformer:
    """A model, or the part of it that one rank runs.

    `caches` arguments hold one `LayerCache` for each layer here, MTP layers last. `embed` is on
    the first stage, `head` on the last.
    """

    config: ModelConfig
    numerics: Numerics
    shard: Shard
    embed: torch.Tensor | None
    layers: Sequence[Block]
    head: Head | None
    mtp: Sequence[MTP]

    @classmethod
    def read(
        cls,
        source: Source,
        config: ModelConfig,
        numerics: Numerics,
        *,
        with_mtp: bool,
        shard: Shard | None = None,
    ) -> Transformer:
        """Read every tensor the shard needs, each once, in the checkpoint's order.

        Raises:
            ValueError: MTP is wanted of a part that is not the whole.
        """
        if shard is None:
            shard = Shard.whole(config)
        first, end = shard.layers
        if with_mtp and (first, end) != (0, config.n_layers):
            raise ValueError("MTP needs the whole network on one rank")
        embed = read_plain(source, "embed", numerics.dtype) if first == 0 else None
        layers = [
            Block.read(source, f"layers.{n}", config, n, numerics, shard) for n in range(first, end)
        ]
        head = None
        if end == config.n_layers:
            weight = read_plain(source, "head", torch.float32)
            norm = read_plain(source, "norm", torch.float32)
            head = Head(Mixer.read(source, "hc_head"), norm, weight, config, shard.tp)
        mtp = (
            [MTP.read(source, n, config, numerics, head.weight, shard)
             for n in range(config.n_mtp_layers)]
            if with_mtp and head is not None
            else []
        )  # fmt: skip
        return cls(config, numerics, shard, embed, layers, head, mtp)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up, [n] to [n, dim]; TP ranks have a part of the vocabulary each.

        Raises:
            ValueError: this is not the first stage.
        """
        if self.embed is None:
            raise ValueError("only the first stage embeds")
        tp = self.shard.tp
        if tp.size == 1:
            return self.embed[ids]
        n = len(self.embed)
        local = ids - tp.rank * n
        is_here = (local >= 0) & (local < n)
        rows = self.embed[local.clamp(0, n - 1)].masked_fill(~is_here.unsqueeze(-1), 0)
        return tp.all_reduce(rows)

    @property
    def cached_layers(self) -> tuple[int, int]:
        """Layers that need caches, half-open: the drafter's follow the network's."""
        first, end = self.shard.layers
        return first, end + len(self.mtp)

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
            x = self.embedded(own.input_ids).unsqueeze(1).repeat(1, self.config.hc_mult, 1)
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
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the token after the next one, fp32 logits of every token or of `rows`.

        A `batch` of None has no tokens: the rank only serves the drafter's experts.

        Shapes:
            x         [n_tokens, hc_mult, dim]: streams of this step, as `__call__` returned them
            next_ids  [n_tokens]  int64: the token that follows each one
            rows      [n_rows]  int64
            return    [n_tokens or n_rows, vocab_size]
        """
        mtp, eps = self.mtp[0], self.config.norm_eps
        e = mtp.e_proj(rms_norm(self.embedded(next_ids), mtp.enorm, eps))
        h = mtp.h_proj(rms_norm(x, mtp.hnorm, eps).flatten(0, 1)).view_as(x)
        x = mtp.block(e.unsqueeze(1) + h, batch, batch, caches[self.config.n_layers])
        return mtp.head(x if rows is None else x[rows])
