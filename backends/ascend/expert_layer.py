"""A layer's INT8 experts on the A3 in one vendor call, between ranks.

As with MC2 the choice must be the same on all ranks, so `why_not` looks at what they have in
common; how many tokens each has is exchanged first. Too many for the operator go part by part.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.activation import FIRST, keep_first_product
from v4_ascend.backends.ascend.custom_ops import c_ascend
from v4_ascend.backends.ascend.int8 import fp32_in_low_half
from v4_ascend.backends.ascend.layouts import store_in_tiles
from v4_ascend.backends.ascend.soc import A3, current_chip
from v4_ascend.ops import (
    Group,
    expert_layer,
    grouped_int8_gemm,
    grouped_int8_gemm_swiglu,
    int8_act_quant,
    moe_combine,
    moe_dispatch,
)
from v4_ascend.ops.int8 import is_int4
from v4_ascend.supernode.collective_buffers import DEFAULT_MB, MB

LAYER = "whole expert layer"  # of w2's scale: w2 [e, inter, dim], scales of w13 and of w2
MAX_RANKS = 32  # vllm-ascend takes it up to there
BUFFER_COPIES, BUFFER_SPARE = 3, 10 * MB  # of a rank's rows; bytes beside them


@expert_layer.preparation("ascend")
def keep_layer(
    w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> None:
    """Keep both weights as the operator reads them; w2 itself shows the same bytes."""
    if current_chip() != A3 or is_int4(w13, w13_scale) or prepared.has(w2_scale, LAYER):
        return
    keep_first_product(w13, w13_scale)
    store_in_tiles(w2)
    made = w2.transpose(1, 2), fp32_in_low_half(w13_scale), fp32_in_low_half(w2_scale)
    prepared.keep(w2_scale, LAYER, made)


def _why_not(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    limit: float,
    group: Group,
) -> str | None:
    if group.size == 1:
        return "one rank: nothing travels"
    if group.size > MAX_RANKS:
        return f"{group.size} ranks, at most {MAX_RANKS}"
    if group.hccl_name is None:
        return "the group has no HCCL communicator to name"
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, must be bf16"
    if not prepared.has(w2_scale, LAYER):
        return "the weights were not prepared, or are int4"
    return None if limit > 0 else f"limit is {limit}, of which the operator makes no limit"


@expert_layer.kernel("ascend", provider="_C_ascend", why_not=_why_not)
def dispatch_ffn_combine(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    limit: float,
    group: Group,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring all ranks to the same number of tokens; those that are added have nobody's experts."""
    n, topk = ids.shape
    counts = torch.cat(list(group.all_gather(torch.tensor([n], device=x.device))))
    most = int(counts.max())
    has = int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_MB)) * MB
    if not most or most * topk * x.shape[1] * BUFFER_COPIES + BUFFER_SPARE > has:
        return _by_parts(x, ids, weights, w13, w13_scale, w2, w2_scale, limit, group)
    local = len(w13_scale)
    (first,), (second, *scales) = prepared.get(w13_scale, FIRST), prepared.get(w2_scale, LAYER)
    out = torch.empty(most, x.shape[1], dtype=x.dtype, device=x.device)
    rows = torch.zeros(local, dtype=torch.int32, device=x.device)
    more: dict[str, Any] = {"pad": (0, 0, 0, most - n)}
    with group.noted("dispatch_ffn_combine", x):
        c_ascend("dispatch_ffn_combine")(
            F.pad(x, **more),
            [first],
            [second],
            F.pad(ids.int(), **more, value=local * group.size),
            [scales[0]],
            [scales[1]],
            [],  # no biases
            [],
            F.pad(weights, **more),
            group.hccl_name,
            most * topk * group.size,  # as many rows as can arrive
            out,
            rows,
            swiglu_limit=limit,
        )
    return out[:n], rows.long()


def _by_parts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    limit: float,
    group: Group,
) -> tuple[torch.Tensor, torch.Tensor]:
    n_experts = len(w13_scale) * group.size
    rows, row_weights, sizes, source, tokens = moe_dispatch(
        x, ids, weights, n_experts, group, False
    )
    values, scales = grouped_int8_gemm_swiglu(*int8_act_quant(rows), w13, w13_scale, sizes, limit)
    done = grouped_int8_gemm(values, scales * row_weights, w2, w2_scale, sizes, x.dtype)
    return moe_combine(done, source, ids.shape[1], tokens, group).to(x.dtype), sizes
