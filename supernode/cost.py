"""Bytes, operations and kernels of one step on one rank, operator by operator.

Every input is read once and every output written once; weights are in the planned format.
Shapes and formulas: spec sections 2 and 6 of the published code; FLOPs count a MAC as 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from v4_ascend.config.model import DSparkConfig, ModelConfig
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.supernode.memory import MemoryModel
from v4_ascend.supernode.weights import layer_weights, outer_weights

Part = Literal["attention", "indexer", "compressor", "experts", "mixing", "head"]
Unit = Literal["dense", "bf16", "vector"]
ACT = 2  # bytes of an activation


@dataclass(frozen=True, slots=True)
class OpCost:
    """What one operator moves and computes, and in how many kernels."""

    name: str
    part: Part
    n_bytes: float
    flops: float
    unit: Unit
    n_kernels: int = 1


@dataclass(frozen=True, slots=True)
class Load:
    """Work of one rank: new tokens, the requests they are of, and the context before them.

    `n_group_tokens` are the tokens of the whole EP group; `imbalance` is the busiest rank's
    share of routed tokens over the mean. In prefill, the tokens of a request share its cache.
    """

    n_tokens: int
    n_requests: int
    context: int
    n_group_tokens: int
    imbalance: float
    is_prefill: bool = False


class CostModel:
    """Costs of the layers of one model under one layout."""

    def __init__(self, memory: MemoryModel, parallel: ParallelConfig) -> None:
        self.memory, self.p = memory, parallel
        self.config: ModelConfig = memory.config
        self.fmt = memory.serving.weight_format
        c, p = self.config, parallel
        self.heads = c.n_heads if p.dsa_cp else c.n_heads / p.tp_size
        self.local_experts = memory.local_experts(p)

    def layer(self, layer: int, load: Load) -> Iterator[OpCost]:
        """Cost one block: attention of its kind, then experts, mixing around both."""
        ratio = self.config.compress_ratios[layer]
        yield from self._attention(layer, ratio, load)
        yield from self._experts(layer, load)
        yield from self._mixing(load)

    def head(self, load: Load) -> OpCost:
        """Cost the output head over the tokens that are sampled."""
        c = self.config
        n = load.n_requests if load.is_prefill else load.n_tokens
        weight = outer_weights(c, self.fmt).split["head"] / self.p.tp_size
        return OpCost("head", "head", weight, 2 * n * weight / ACT, "bf16")

    def markov(self, load: Load, dspark: DSparkConfig) -> OpCost:
        """Cost one correction of DSpark's logits: a matrix over the vocabulary, kept in fp32."""
        weight = self.config.vocab_size * dspark.markov_rank * 4
        logits = load.n_requests * self.config.vocab_size * 4
        flops = 2 * load.n_requests * weight / 4
        return OpCost("markov head", "head", weight + 3 * logits, flops, "bf16", 4)

    def _attention(self, layer: int, ratio: int, load: Load) -> Iterator[OpCost]:
        c, n, tp = self.config, load.n_tokens, self.p.tp_size
        w = layer_weights(c, layer, self.fmt)
        own = n / tp if self.p.dsa_cp else n  # queries of this rank in the attention core
        split = w.split["attention"] / tp
        dense = split + w.replicated["attention"]
        q_dim = c.n_heads * c.head_dim / tp
        n_params = (c.dim + q_dim) * c.q_lora_rank + c.dim * c.head_dim
        n_params += q_dim * c.o_lora_rank + c.o_groups * c.o_lora_rank / tp * c.dim
        moved = dense + n * ACT * (2 * c.dim + 3 * q_dim)
        yield OpCost("projections", "attention", moved, 2 * n * n_params, "dense", 8)
        rows = self._visible(ratio, load)
        cached = load.n_requests if load.is_prefill else own
        read = cached * (rows.read + c.window_size) * self.memory.records.kv
        core = 4 * own * self.heads * c.head_dim * (rows.attended + c.window_size)
        touched = read + own * self.heads * c.head_dim * ACT * 2
        yield OpCost("sparse_attn", "attention", touched, core, "bf16", 2)
        if ratio:
            wide = 2 if ratio == 4 else 1
            params = 2 * wide * c.dim * (c.head_dim + (c.index_head_dim if ratio == 4 else 0))
            state = n * 2 * wide * c.head_dim * 4 * 2
            weight = w.replicated["compressor"]
            n_kernels = 4 if ratio == 4 else 2
            yield OpCost(
                "compress_kv", "compressor", weight + state, 2 * n * params, "bf16", n_kernels
            )
        if ratio == 4:
            yield from self._indexer(w.replicated["indexer"], rows.visible, own, load)

    def _indexer(self, weight: int, visible: float, own: float, load: Load) -> Iterator[OpCost]:
        c = self.config
        width = c.index_n_heads * c.index_head_dim
        yield OpCost(
            "index projections",
            "indexer",
            weight + load.n_tokens * width * ACT,
            2 * load.n_tokens * c.q_lora_rank * width,
            "dense",
            4,
        )
        cached = load.n_requests if load.is_prefill else own
        keys = cached * visible * self.memory.records.index
        yield OpCost("index_select", "indexer", keys, 2 * own * width * visible, "dense", 2)

    def _experts(self, layer: int, load: Load) -> Iterator[OpCost]:
        c = self.config
        w = layer_weights(c, layer, self.fmt)
        params = 3 * c.dim * c.moe_inter_dim
        routed = load.n_group_tokens * c.n_activated_experts / self.p.ep_size * load.imbalance
        miss = (1 - c.n_activated_experts / c.n_routed_experts) ** load.n_group_tokens
        active = self.local_experts * (1 - miss)
        moved = active * w.expert + routed * ACT * (2 * c.dim + c.moe_inter_dim)
        yield OpCost("gate", "experts", w.replicated["gate"], 0, "bf16", 2)
        yield OpCost("experts", "experts", moved, 2 * routed * params, "dense", 4)
        n = load.n_tokens
        yield OpCost(
            "shared expert",
            "experts",
            w.replicated["shared"] + n * ACT * (2 * c.dim + c.moe_inter_dim),
            2 * n * params,
            "dense",
            3,
        )

    def _mixing(self, load: Load) -> Iterator[OpCost]:
        c, n = self.config, load.n_tokens
        wide = c.hc_mult * c.dim
        mixes = c.hc_mult * (2 + c.hc_mult)
        # Before and after each half: read and write the streams, and mix them in fp32.
        yield OpCost(
            "mixing",
            "mixing",
            2 * (n * ACT * 10 * c.dim + mixes * wide * 4),
            2 * 2 * n * mixes * wide,
            "vector",
            4,
        )

    def _visible(self, ratio: int, load: Load) -> _Rows:
        """Compressed rows a query sees, attends to, and a request's queries read in all."""
        if not ratio:
            return _Rows(0, 0, 0)
        before = load.context / ratio
        new = load.n_tokens / max(load.n_requests, 1) / ratio if load.is_prefill else 0
        visible = before + new / 2
        if ratio == 4:
            attended = min(visible, self.config.index_topk)
            return _Rows(visible, attended, before + new if load.is_prefill else attended)
        return _Rows(visible, visible, before + new)


@dataclass(frozen=True, slots=True)
class _Rows:
    visible: float
    attended: float
    read: float
