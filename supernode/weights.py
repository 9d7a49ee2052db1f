"""What the weights of a layer take on a device, by tensor, in the format an engine keeps them.

Sources: model.safetensors.index.json of DeepSeek-V4-Flash and -Pro (native); cann-recipes-infer's
V4 inference guide, section on quantisation (which tensors are INT8 on A2 and A3, MX formats on
950).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from v4_ascend.config.devices import WeightFormat
from v4_ascend.config.inventory import (
    TensorSpec,
    expert_tensors,
    layer_tensors,
    model_tensors,
)
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.quant_types import base_of

Group = Literal[
    "attention", "compressor", "indexer", "shared", "gate", "mixing", "drafter", "embed", "head"
]
# TP splits these by heads or output groups; everything else of attention is replicated.
SPLIT = {"wq_b", "wo_a", "wo_b", "attn_sink"}
# What the published INT8 checkpoints quantise; other linear layers stay BF16.
INT8 = {"attn.wq_b", "attn.wo_b", "attn.indexer.wq_b"}
MX_GROUP = 32  # values that share one E8M0 scale
SCALE_BYTES = 4  # of an INT8 or INT4 output channel, fp32


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Bytes of one layer: what TP splits, what every rank has, and one routed expert."""

    split: dict[Group, int]
    replicated: dict[Group, int]
    expert: int

    def total(self, n_experts: int) -> int:
        """Bytes with `n_experts` routed experts."""
        return sum(self.split.values()) + sum(self.replicated.values()) + n_experts * self.expert


@lru_cache(maxsize=4096)
def layer_weights(config: ModelConfig, layer: int, fmt: WeightFormat) -> LayerWeights:
    """Weigh one layer; MTP layers, or the drafter's blocks, follow the main ones."""
    same = _alike(config, layer)
    if same != layer:
        return layer_weights(config, same, fmt)
    return _weigh(layer_tensors(config, layer), fmt, _sum(expert_tensors(config), fmt, "expert"))


def outer_weights(config: ModelConfig, fmt: WeightFormat) -> LayerWeights:
    """Weigh what belongs to no layer: embedding, head, last norm and mixer."""
    return _weigh(model_tensors(config), fmt, 0)


def model_bytes(config: ModelConfig, fmt: WeightFormat, *, drafter: bool = True) -> int:
    """Sum all weights, each once."""
    n = config.n_layers + (config.n_draft_layers if drafter else 0)
    layers = (layer_weights(config, i, fmt).total(config.n_routed_experts) for i in range(n))
    return outer_weights(config, fmt).total(0) + sum(layers)


def _alike(config: ModelConfig, layer: int) -> int:
    """Return the first layer with the same tensors."""
    if layer >= config.n_layers:
        return layer
    kind = (config.compress_ratios[layer], layer < config.n_hash_layers)
    return next(
        i
        for i in range(config.n_layers)
        if (config.compress_ratios[i], i < config.n_hash_layers) == kind
    )


def _weigh(tensors: Iterable[TensorSpec], fmt: WeightFormat, expert: int) -> LayerWeights:
    split: dict[Group, int] = {}
    replicated: dict[Group, int] = {}
    for name, parts in _linears(tensors).items():
        group, is_split = _place(name)
        into = split if is_split else replicated
        into[group] = into.get(group, 0) + _bytes(name, parts, fmt)
    return LayerWeights(split, replicated, expert)


def _linears(tensors: Iterable[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """Join weight and scale of each linear layer."""
    joined: dict[str, list[TensorSpec]] = {}
    for t in tensors:
        name = t.name.partition(".")[2] if t.name.startswith(("layer.", "mtp.")) else t.name
        joined.setdefault(base_of(name), []).append(t)
    return joined


def _place(name: str) -> tuple[Group, bool]:
    if name in ("embed", "head"):
        return ("embed" if name == "embed" else "head"), True  # by vocabulary
    part, _, rest = name.partition(".")
    if part == "attn":
        inner = rest.partition(".")[0]
        if inner in ("compressor", "indexer"):
            return ("compressor" if inner == "compressor" else "indexer"), False
        return "attention", inner in SPLIT
    if part == "ffn":
        return ("shared" if rest.startswith("shared_experts") else "gate"), False
    is_mixing = "hc_" in name or "norm" in name
    return ("mixing" if is_mixing else "drafter"), False


def _sum(tensors: Iterable[TensorSpec], fmt: WeightFormat, name: str) -> int:
    return sum(_bytes(name, parts, fmt) for parts in _linears(tensors).values())


def _bytes(name: str, parts: list[TensorSpec], fmt: WeightFormat) -> int:
    weight = parts[0]
    if any(t.name.endswith(".weight_scale") for t in parts):
        return sum(t.nbytes for t in parts)  # converted: it is what the engine keeps
    is_fp4 = weight.dtype == "I8"
    if fmt == "native" or not (is_fp4 or weight.dtype == "F8_E4M3" or _is_matrix(name, weight)):
        return sum(t.nbytes for t in parts)
    n_values = prod(weight.shape) * (2 if is_fp4 else 1)
    n_out = weight.shape[0]
    if fmt == "mx":
        # FP4 groups are MX as they are; FP8 blocks get a scale for each 32 values of a row.
        return sum(t.nbytes for t in parts) if is_fp4 else n_values + n_values // MX_GROUP
    if fmt == "w4a8" and name == "expert":
        return n_values // 2 + n_out * SCALE_BYTES
    if fmt in ("w8a8", "w4a8") and (name == "expert" or name in INT8 or "shared" in name):
        return n_values + n_out * SCALE_BYTES
    return 2 * n_values


def _is_matrix(name: str, weight: TensorSpec) -> bool:
    """Say whether an unquantised checkpoint's tensor is one that a quantised one has in FP8."""
    return name == "expert" and weight.dtype in ("BF16", "F32")
