"""What the network is stacked of: hyper-connected blocks, and the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.attention import Attention
from v4_ascend.model.batch import Batch, LayerCache
from v4_ascend.model.linear import Source, read_plain
from v4_ascend.model.moe import MoE
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard
from v4_ascend.ops import Group, hc_head, hc_post, hc_pre, linear, rms_norm


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
        """Turn [n, hc_mult, dim] into fp32 logits [n, vocab_size]."""
        return self.project(self.collapse(x))

    def collapse(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the streams [n, hc_mult, dim] into one, [n, dim]."""
        c = self.config
        return hc_head(x, self.hc.fn, self.hc.scale, self.hc.base, c.norm_eps, c.hc_eps)

    def project(self, y: torch.Tensor) -> torch.Tensor:
        """Norm [n, dim] and turn it into fp32 logits [n, vocab_size]."""
        logits = linear(rms_norm(y, self.norm, self.config.norm_eps).float(), self.weight)
        if self.tp.size == 1:
            return logits
        return torch.cat(list(self.tp.all_gather(logits, [len(y)] * self.tp.size)), dim=-1)
