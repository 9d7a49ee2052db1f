"""The drafter of the April releases: one more block, which guesses one token ahead.

For further guesses it is given its own streams, as vLLM does it; the published code ends at one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.batch import Batch, LayerCache
from v4_ascend.model.block import Block, Head, Mixer
from v4_ascend.model.linear import Linear, Source, read_plain
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard
from v4_ascend.ops import rms_norm


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

    def __call__(
        self,
        x: torch.Tensor,
        embedded: torch.Tensor,
        batch: Batch | None,
        own: Batch | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Return the module's streams of each token of `own`, as `Block` has it.

        Without tokens the rank only serves the module's experts.

        Shapes:
            x         [n_own, hc_mult, dim]: streams behind the last layer
            embedded  [n_own, dim]: embeddings of the tokens that follow
        """
        eps = self.head.config.norm_eps
        e = self.e_proj(rms_norm(embedded, self.enorm, eps))
        h = self.h_proj(rms_norm(x, self.hnorm, eps).flatten(0, 1)).view_as(x)
        return self.block(e.unsqueeze(1) + h, batch, own, cache)
