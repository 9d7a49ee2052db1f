"""FLOPs and cache of one decoded token against DeepSeek-V3.2: the report's headline, derived.

Source: DeepSeek-V4 technical report (27 % of the FLOPs and 10 % of the cache for Pro, 10 % and
7 % for Flash at 1M tokens, "in equivalent FP8 FLOPs"). V3.2: 61 layers, 37 B active parameters,
656-byte cache rows and 132-byte index keys, 64 x 128 indexer, 2,048 of top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from v4_ascend.config.inventory import expert_tensors, layer_tensors, model_tensors
from v4_ascend.config.model import ModelConfig
from v4_ascend.supernode.cache import SPEC_RECORDS, RecordBytes, bytes_per_token

V32_LAYERS, V32_HEADS, V32_TOPK = 61, 128, 2048
V32_ACTIVE = 37e9
V32_ROW, V32_KEY = 656, 132
V32_INDEX = 64 * 128
# What a FLOP of each precision costs in FP8 FLOPs.
FP4, FP8, BF16 = 0.5, 1.0, 2.0


@dataclass(frozen=True, slots=True)
class TokenCost:
    """FLOPs of one token by part, each with its weight in FP8 FLOPs; bytes a token of context."""

    flops: Mapping[str, tuple[float, float]]
    bytes_per_token: float

    @property
    def fp8_flops(self) -> float:
        """Equivalent FP8 FLOPs."""
        return sum(n * weight for n, weight in self.flops.values())


def v4_token(config: ModelConfig, context: int, records: RecordBytes = SPEC_RECORDS) -> TokenCost:
    """Count one decoded token of a V4 model after `context` tokens (no drafting)."""
    c = config
    ratios = c.compress_ratios[: c.n_layers]
    n_csa, n_hca = ratios.count(4), ratios.count(128)
    n_swa = ratios.count(0)
    core = c.n_heads * c.head_dim * 4
    flops = {
        "linear": (2.0 * _active(c), FP8),
        "indexer": (
            n_csa * context / 4 * c.index_n_heads * c.index_head_dim * 2,
            FP4 if records.index == SPEC_RECORDS.index else FP8,
        ),
        "CSA attention": (float(n_csa * (c.index_topk + c.window_size) * core), BF16),
        "HCA attention": (n_hca * (context / 128 + c.window_size) * core, BF16),
        "window attention": (float(n_swa * c.window_size * core), BF16),
    }
    return TokenCost(flops, bytes_per_token(c, records))


def v32_token(context: int) -> TokenCost:
    """Count one decoded token of DeepSeek-V3.2 after `context` tokens."""
    flops = {
        "linear": (2 * V32_ACTIVE, FP8),
        "indexer": (V32_LAYERS * context * V32_INDEX * 2.0, FP8),
        "sparse attention": (V32_LAYERS * V32_TOPK * V32_HEADS * (512 + 64 + 512) * 2.0, BF16),
    }
    return TokenCost(flops, float(V32_LAYERS * (V32_ROW + V32_KEY)))


def _active(c: ModelConfig) -> float:
    """Parameters a token multiplies: all but the embedding and the experts it does not visit."""
    total = 0.0
    for layer in range(c.n_layers):
        matrices = (t for t in layer_tensors(c, layer) if len(t.shape) == 2)
        total += sum(
            t.shape[0] * t.shape[1] for t in matrices if t.name.endswith(("weight", "_fn"))
        )
    expert = sum(
        t.shape[0] * t.shape[1] * (2 if t.dtype == "I8" else 1)
        for t in expert_tensors(c)
        if t.name.endswith("weight")
    )
    total += c.n_layers * c.n_activated_experts * expert
    return total + sum(t.shape[0] * t.shape[1] for t in model_tensors(c) if t.name == "head.weight")
