"""Mixture of experts: learned or hashed routing, one shared expert."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.linear import GroupedLinear, Source, read_plain
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard, Slots, gathered, span_of
from v4_ascend.model.side_stream import side_stream
from v4_ascend.ops import (
    Group,
    expert_layer,
    grouped_int8_gemm_swiglu,
    hash_gate,
    int8_act_quant,
    linear,
    moe_combine,
    moe_dispatch,
    swiglu,
    swiglu_act_quant,
    topk_gate,
)


@dataclass(frozen=True)
class Gate:
    """The router; exactly one of `bias` and `tid2eid` is there."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tid2eid: torch.Tensor | None
    topk: int
    route_scale: float

    @classmethod
    def read(cls, source: Source, at: str, config: ModelConfig, *, is_hash: bool) -> Gate:
        """Read ``at.*`` of a hash layer or of a learned one."""
        tid2eid = source(f"{at}.tid2eid") if is_hash else None
        if tid2eid is not None:
            hash_gate.prepare(tid2eid)
        return cls(
            weight=read_plain(source, at, torch.float32),
            bias=None if is_hash else source(f"{at}.bias").float(),
            tid2eid=tid2eid,
            topk=config.n_activated_experts,
            route_scale=config.route_scale,
        )

    def __call__(
        self, x: torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and ids, [n_tokens, topk] each; always in fp32."""
        logits = linear(x.float(), self.weight)
        if self.tid2eid is not None:
            return hash_gate(logits, self.tid2eid, input_ids, self.route_scale)
        if self.bias is None:
            raise ValueError("a learned gate needs its bias")
        return topk_gate(logits, self.bias, self.topk, self.route_scale)


@dataclass(frozen=True)
class Experts:
    """Several feed-forward networks; gate and up projection are one product."""

    w13: GroupedLinear
    w2: GroupedLinear
    swiglu_limit: float

    @classmethod
    def read(cls, source: Source, names: list[str], limit: float, numerics: Numerics) -> Experts:
        """Read ``name.w1``, ``w2`` and ``w3`` of every expert."""
        gate_up: list[tuple[str, ...]] = [(f"{n}.w1", f"{n}.w3") for n in names]
        w13 = GroupedLinear.read(source, gate_up, numerics, grouped_int8_gemm_swiglu)
        w2 = GroupedLinear.read(source, [(f"{n}.w2",) for n in names], numerics)
        return cls(w13, w2, limit)

    def __call__(
        self, x: torch.Tensor, group_sizes: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Run rows grouped by expert, [n_rows, dim] to [n_rows, dim]."""
        if self.w13.is_int and self.w13.scale is not None:
            values, scales = grouped_int8_gemm_swiglu(
                *int8_act_quant(x), self.w13.weight, self.w13.scale, group_sizes, self.swiglu_limit
            )
            if weights is not None:  # positive: it scales a row and leaves its integers
                scales = scales * weights
            return self.w2.of_quantised(values, scales, group_sizes)
        hidden = self.w13(x, group_sizes)
        if self.w2.rounds_input:
            quantised = swiglu_act_quant(hidden, self.swiglu_limit, weights)
            return self.w2.of_quantised(*quantised, group_sizes)
        return self.w2(swiglu(hidden, self.swiglu_limit, weights), group_sizes)


@dataclass(frozen=True)
class MoE:
    """The feed-forward half of a layer.

    Shapes:
        load  [n_local]  int64: rows each of this rank's slots got since it was read
    """

    gate: Gate
    experts: Experts
    shared_experts: Experts
    slots: Slots | None
    n_slots: int
    load: torch.Tensor
    tp: Group
    ep: Group

    @classmethod
    def read(
        cls,
        source: Source,
        at: str,
        config: ModelConfig,
        numerics: Numerics,
        placed: Sequence[tuple[int, ...]],
        shard: Shard,
        *,
        is_hash: bool,
    ) -> MoE:
        """Read ``at.*``, of the routed experts those `placed` on this rank of the EP group."""
        own = placed[shard.ep.rank]
        limit = config.swiglu_limit
        gate = Gate.read(source, f"{at}.gate", config, is_hash=is_hash)
        names = [f"{at}.experts.{e}" for e in own]
        device = gate.weight.device
        layer = cls(
            gate=gate,
            experts=Experts.read(source, names, limit, numerics),
            shared_experts=Experts.read(source, [f"{at}.shared_experts"], limit, numerics),
            slots=Slots.of(placed, device),
            n_slots=sum(map(len, placed)),
            load=torch.zeros(len(own), dtype=torch.int64, device=device),
            tp=shard.tp,
            ep=shard.ep,
        )
        if (whole := layer._whole()) is not None:
            expert_layer.prepare(*whole[:4])
        return layer

    def __call__(self, x: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Mix experts, [n_tokens, dim] to [n_tokens, dim]; sums are fp32, rounded once.

        TP ranks have the same tokens: each takes a share of them to the experts.
        """
        n = len(x)
        if self.tp.size > 1:
            first, end = span_of(n, self.tp)
            x, input_ids = x[first:end], input_ids[first:end]
        weights, ids = self.gate(x, input_ids)
        if self.slots is not None:
            ids = self.slots(ids)
        # Every token's, so it needs nobody, and is computed while rows travel.
        everyone = torch.full((1,), x.shape[0], device=x.device)
        side = side_stream(x.device) if self.ep.size > 1 else None
        with side.begun() if side else nullcontext():
            shared = self.shared_experts(x, everyone, None)
        y = self._routed(x, ids, weights)
        if side:
            side.join()
        y = (y + shared.float()).to(x.dtype)
        return gathered(y, n, self.tp)

    def _routed(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum each token's choices, [n_tokens, dim] in fp32, and count the rows that came here."""
        whole = self._whole()
        if whole is not None and expert_layer.is_taken(x, ids, weights, *whole):
            y, group_sizes = expert_layer(x, ids, weights, *whole)
            self.load.add_(group_sizes)
            return y.float()
        fp8 = self.ep.size > 1 and self.experts.w13.rounds_input
        rows, row_weights, group_sizes, source, tokens_per_rank = moe_dispatch(
            x, ids, weights, self.n_slots, self.ep, fp8
        )
        self.load.add_(group_sizes)
        routed = self.experts(rows, group_sizes, row_weights)
        return moe_combine(routed, source, ids.shape[1], tokens_per_rank, self.ep)

    def _whole(self) -> tuple[Any, ...] | None:
        """Return what `expert_layer` has of this layer; None where that is never for it."""
        w13, w2 = self.experts.w13, self.experts.w2
        if self.ep.size == 1 or not w13.is_int or w13.scale is None or w2.scale is None:
            return None
        return w13.weight, w13.scale, w2.weight, w2.scale, self.experts.swiglu_limit, self.ep
