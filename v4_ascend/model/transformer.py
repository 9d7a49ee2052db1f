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
from v4_ascend.ops import hc_head, hc_post, hc_pre, rms_norm

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
        cls, source: Source, at: str, config: ModelConfig, layer: int, numerics: Numerics
    ) -> Block:
        """Read ``at.*``, layer `layer` of the configuration; MTP layers follow the main ones."""
        is_hash = layer < config.n_hash_layers
        ratio = config.compress_ratios[layer]
        return cls(
            attn_norm=read_plain(source, f"{at}.attn_norm", torch.float32),
            ffn_norm=read_plain(source, f"{at}.ffn_norm", torch.float32),
            hc_attn=Mixer.read(source, f"{at}.hc_attn"),
            hc_ffn=Mixer.read(source, f"{at}.hc_ffn"),
            attn=Attention.read(source, f"{at}.attn", config, ratio, numerics),
            ffn=MoE.read(source, f"{at}.ffn", config, numerics, is_hash=is_hash),
            config=config,
        )

    def __call__(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """Run streams [n_tokens, hc_mult, dim] through the layer."""
        u, post, comb = self._pre(x, self.hc_attn)
        u = rms_norm(u, self.attn_norm, self.config.norm_eps)
        x = hc_post(self.attn(u, batch, cache), x, post, comb)
        u, post, comb = self._pre(x, self.hc_ffn)
        u = rms_norm(u, self.ffn_norm, self.config.norm_eps)
        return hc_post(self.ffn(u, batch.input_ids), x, post, comb)

    def _pre(
        self, x: torch.Tensor, mixer: Mixer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        c = self.config
        eps = (c.norm_eps, c.hc_eps)
        return hc_pre(x, mixer.fn, mixer.scale, mixer.base, *eps, c.hc_sinkhorn_iters)


@dataclass(frozen=True)
class Head:
    """Streams to logits: collapse, norm, project in fp32."""

    hc: Mixer
    norm: torch.Tensor
    weight: torch.Tensor
    config: ModelConfig

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Project [n, hc_mult, dim] to fp32 logits [n, vocab_size]."""
        c = self.config
        y = hc_head(x, self.hc.fn, self.hc.scale, self.hc.base, c.norm_eps, c.hc_eps)
        return F.linear(rms_norm(y, self.norm, c.norm_eps).float(), self.weight)


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
        cls, source: Source, stage: int, config: ModelConfig, numerics: Numerics, head: torch.Tensor
    ) -> MTP:
        """Read ``mtp.stage.*``; embedding and output projection are the main model's."""
        at = f"mtp.{stage}"
        return cls(
            e_proj=Linear.read(source, f"{at}.e_proj", numerics),
            h_proj=Linear.read(source, f"{at}.h_proj", numerics),
            enorm=read_plain(source, f"{at}.enorm", torch.float32),
            hnorm=read_plain(source, f"{at}.hnorm", torch.float32),
            block=Block.read(source, at, config, config.n_layers + stage, numerics),
            head=Head(
                Mixer.read(source, f"{at}.hc_head"),
                read_plain(source, f"{at}.norm", torch.float32),
                head,
                config,
            ),
        )


@dataclass(frozen=True)
class Transformer:
    """A whole model on one device.

    `caches` arguments hold one `LayerCache` per layer, MTP layers last.
    """

    config: ModelConfig
    numerics: Numerics
    embed: torch.Tensor
    layers: Sequence[Block]
    head: Head
    mtp: Sequence[MTP]

    @classmethod
    def read(
        cls, source: Source, config: ModelConfig, numerics: Numerics, *, with_mtp: bool
    ) -> Transformer:
        """Read every tensor the model needs, each once."""
        weight = read_plain(source, "head", torch.float32)
        norm = read_plain(source, "norm", torch.float32)
        stages = range(config.n_mtp_layers if with_mtp else 0)
        return cls(
            config=config,
            numerics=numerics,
            embed=read_plain(source, "embed", numerics.dtype),
            layers=[
                Block.read(source, f"layers.{n}", config, n, numerics)
                for n in range(config.n_layers)
            ],
            head=Head(Mixer.read(source, "hc_head"), norm, weight, config),
            mtp=[MTP.read(source, n, config, numerics, weight) for n in stages],
        )

    def __call__(
        self, batch: Batch, caches: Sequence[LayerCache], observe: Observer | None = None
    ) -> torch.Tensor:
        """Run one step; return the streams [n_tokens, hc_mult, dim] after the last block."""
        x = self.embed[batch.input_ids].unsqueeze(1).repeat(1, self.config.hc_mult, 1)
        for number, layer in enumerate(self.layers):
            x = layer(x, batch, caches[number])
            if observe is not None:
                observe(number, x)
        return x

    def draft(
        self, x: torch.Tensor, next_ids: torch.Tensor, batch: Batch, caches: Sequence[LayerCache]
    ) -> torch.Tensor:
        """Predict the token after the next one, fp32 logits [n_tokens, vocab_size].

        Shapes:
            x         [n_tokens, hc_mult, dim]: streams of this step, as `__call__` returned them
            next_ids  [n_tokens]  int64: the token that follows each one
        """
        mtp, eps = self.mtp[0], self.config.norm_eps
        e = mtp.e_proj(rms_norm(self.embed[next_ids], mtp.enorm, eps))
        h = mtp.h_proj(rms_norm(x, mtp.hnorm, eps).flatten(0, 1)).view_as(x)
        return mtp.head(mtp.block(e.unsqueeze(1) + h, batch, caches[self.config.n_layers]))
