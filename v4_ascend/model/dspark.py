"""DSpark, the drafter of the later releases: a block of guesses at once.

Its stages attend to keys made of what the network knew of every token so far, and to the whole
block: its tokens are the last one drawn, and noise. What the block says is corrected from left to
right by the guess before, and each guess comes with the chance that it is right.

Sources: inference/model.py of DeepSeek-V4-Flash-0731 (DSparkBlock, DSparkAttention, forward_spec)
as MindStudio's ModelSlim ports it, and that of V4.1-Flash; hebo1221/nano-deepseek-v4
docs/verification/dspark.md for what is easily got wrong and for the equations of the paper
(arXiv 2607.05147: 2, 3, 5 and 7).
V4.1 takes the streams in front of its target layers, these models behind them (vllm PR 46995).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from v4_ascend.config.model import DSparkConfig, ModelConfig
from v4_ascend.model.batch import Batch, LayerCache
from v4_ascend.model.block import Block, Head, Mixer
from v4_ascend.model.linear import Linear, Source, read_plain
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard, gathered
from v4_ascend.ops import Group, rms_norm


class Targets:
    """Means of a step's streams behind the target layers, by layer: what the drafter is fed.

    Stages hand on those of all layers so far, behind the streams: [n, hc_mult + n_targets, dim].
    """

    def __init__(self, dspark: DSparkConfig, layers: tuple[int, int]) -> None:
        ids = dspark.target_layer_ids
        self.before = [n for n in ids if n < layers[0]]
        self._so_far = [n for n in ids if n < layers[1]]
        self.seen: dict[int, torch.Tensor] = {}

    def observe(self, layer: int, x: torch.Tensor) -> None:
        """See what leaves a layer here."""
        if layer in self._so_far:
            self.seen[layer] = x.mean(1)

    def unpacked(self, x: torch.Tensor) -> torch.Tensor:
        """Keep what the stage before has handed on; return the streams."""
        n = x.shape[1] - len(self.before)
        self.seen = dict(zip(self.before, x[:, n:].unbind(1), strict=True))
        return x[:, :n].contiguous()

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """Return the streams and what is handed on with them; nothing of it is kept."""
        return torch.cat((x, *(self.seen.pop(n).unsqueeze(1) for n in self._so_far)), dim=1)


@dataclass(frozen=True)
class Guesses:
    """What the drafter says behind the last token of each sequence, the most likely first.

    Shapes:
        ids         [batch, block_size]  int64
        logits      [batch, block_size, vocab_size]  fp32, each behind the guesses before it
        confidence  [batch, block_size]  fp32: the chance of a guess, if those before it are right
    """

    ids: torch.Tensor
    logits: torch.Tensor
    confidence: torch.Tensor


@dataclass(frozen=True)
class DSpark:
    """The stages, what feeds them, and what turns their last streams into guesses.

    Shapes:
        markov_w1   [vocab_size, markov_rank]  the numerics' dtype
        markov_w2   [vocab_size, markov_rank]  fp32
        confidence  [1, dim + markov_rank]  fp32
    """

    main_proj: Linear
    main_norm: torch.Tensor
    stages: Sequence[Block]
    head: Head
    markov_w1: torch.Tensor
    markov_w2: torch.Tensor
    confidence: torch.Tensor
    config: ModelConfig
    dspark: DSparkConfig
    cp: Group

    @classmethod
    def read(
        cls,
        source: Source,
        config: ModelConfig,
        dspark: DSparkConfig,
        numerics: Numerics,
        head: torch.Tensor,
        shard: Shard,
    ) -> DSpark:
        """Read ``mtp.*``; embedding and output projection are the main model's."""
        # Every token of a block sees what its last one sees: the window before it, and the block.
        seen = config.window_size + dspark.block_size
        wide, last = config.model_copy(update={"window_size": seen}), config.n_draft_layers - 1
        first, end, at = config.n_layers, config.n_layers + last + 1, f"mtp.{last}"
        fp32 = torch.float32
        return cls(
            main_proj=Linear.read(source, "mtp.0.main_proj", numerics),
            main_norm=read_plain(source, "mtp.0.main_norm", fp32),
            stages=[
                Block.read(source, f"mtp.{n - first}", wide, n, numerics, shard)
                for n in range(first, end)
            ],
            head=Head(
                norm=read_plain(source, f"{at}.norm", fp32),
                hc=Mixer.read(source, f"{at}.hc_head"),
                weight=head,
                config=config,
                tp=shard.tp,
            ),
            markov_w1=read_plain(source, f"{at}.markov_head.markov_w1", numerics.dtype),
            markov_w2=read_plain(source, f"{at}.markov_head.markov_w2", fp32),
            confidence=read_plain(source, f"{at}.confidence_head.proj", fp32),
            config=config,
            dspark=dspark,
            cp=shard.cp,
        )

    def take(
        self, seen: Mapping[int, torch.Tensor], batch: Batch, caches: Sequence[LayerCache]
    ) -> None:
        """Write the keys of a step's tokens, prompts among them, to the stages' windows.

        `seen` has the means [n_own, dim] behind the target layers; `caches` are the stages'.
        """
        main = self.main_proj(torch.cat([seen[n] for n in self.dspark.target_layer_ids], dim=-1))
        main = rms_norm(main, self.main_norm, self.config.norm_eps)
        main = gathered(main, batch.n_tokens, self.cp)
        for stage, cache in zip(self.stages, caches, strict=True):
            stage.attn.write(main, batch, cache)

    def __call__(
        self,
        x: torch.Tensor,
        block: Batch | None,
        own: Batch | None,
        caches: Sequence[LayerCache],
    ) -> Guesses:
        """Guess `block_size` tokens for every sequence of `block`, a batch of its tokens.

        `own` has the tokens of `x`, as in `Block`. A `block` of None has no tokens: the rank only
        serves the stages' experts.

        Shapes:
            x  [n_own, dim]: the tokens' embeddings
        """
        x = x.unsqueeze(1).repeat(1, self.config.hc_mult, 1)
        for stage, cache in zip(self.stages, caches, strict=True):
            x = stage(x, block, own, cache)
        size = self.dspark.block_size
        if block is None:
            nothing = x.new_empty(0, size, dtype=torch.float32)
            return Guesses(nothing.long(), nothing.unsqueeze(-1), nothing)
        hidden = gathered(self.head.collapse(x), block.n_tokens, self.cp)
        n = len(hidden) // size
        base = self.head.project(hidden).unflatten(0, (n, size))
        before = block.input_ids.unflatten(0, (n, size))[:, 0]
        ids, logits, traits = [], [], []
        for k in range(size):
            trait = self.markov_w1[before]
            logits.append(base[:, k] + F.linear(trait.float(), self.markov_w2))
            traits.append(trait)
            before = logits[-1].argmax(-1)
            ids.append(before)
        known = torch.cat((hidden.unflatten(0, (n, size)), torch.stack(traits, 1)), dim=-1)
        confidence = F.linear(known.float(), self.confidence).squeeze(-1).sigmoid()
        return Guesses(torch.stack(ids, 1), torch.stack(logits, 1), confidence)
