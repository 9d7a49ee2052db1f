"""A layer's INT8 experts as one operator: to their ranks, through both products, and back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from v4_ascend.ops.int8 import grouped_int8_gemm, grouped_weight, int8_act_quant
from v4_ascend.ops.int8_fused import grouped_int8_gemm_swiglu
from v4_ascend.ops.moe import Group, dispatch_inputs, moe_combine, moe_dispatch
from v4_ascend.ops.op import ROUNDED, Case, op


def _inputs(
    g: torch.Generator, bits: int, n_tokens: int, dim: int, inter_dim: int, n_experts: int
) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "n_tokens": n_tokens,
        "dim": dim,
        "n_experts": n_experts,
        "topk": min(2, n_experts),
    }
    tokens = dispatch_inputs(g, **shape, dtype=torch.bfloat16)
    w13, w13_scale = grouped_weight(g, (n_experts, 2 * inter_dim, dim), bits)
    w2, w2_scale = grouped_weight(g, (n_experts, dim, inter_dim), bits)
    weights = {"w13": w13, "w13_scale": w13_scale * 8, "w2": w2, "w2_scale": w2_scale}
    given = {name: tokens[name] for name in ("x", "ids", "weights", "group")}
    return given | weights | {"limit": 10.0}


def _cases() -> Iterator[Case]:
    for bits in (8, 4):
        for name, (n_tokens, dim, inter_dim, n_experts) in {
            "empty": (0, 128, 128, 3),
            "few": (5, 128, 256, 3),
            "flash": (7, 4096, 2048, 2),
            "pro": (5, 7168, 3072, 1),  # a case's weights are made in fp32
        }.items():
            shape: dict[str, Any] = {
                "n_tokens": n_tokens,
                "dim": dim,
                "inter_dim": inter_dim,
                "n_experts": n_experts,
            }
            make = partial(_inputs, bits=bits, **shape)
            yield Case(f"int{bits}-{name}", make, models=(name,) if dim >= 4096 else ())


@op(cases=_cases, tolerance=ROUNDED)
def expert_layer(
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
    """Mix the routed experts of every rank's tokens: what these operators do one after the other.

    `moe_dispatch`, `int8_act_quant`, `grouped_int8_gemm_swiglu`, `grouped_int8_gemm` and
    `moe_combine`, with nothing rounded to x's dtype before the sum. A model calls it where a
    kernel takes it, else its parts.

    Shapes:
        x, ids, weights   as `moe_dispatch`, of len(w13) experts on each rank
        w13, w13_scale    as `grouped_int8_gemm_swiglu`
        w2, w2_scale      as `grouped_int8_gemm`
        return            [n_tokens, dim] as x, rows of each expert of this rank [E] int64

    Source: DeepSeek-V4 inference/model.py, MoE; vllm-ascend csrc/mc2/dispatch_ffn_combine.
    """
    n_experts = len(w13_scale) * group.size
    rows, row_weights, sizes, source, tokens_per_rank = moe_dispatch.reference(
        x, ids, weights, n_experts, group, False
    )
    values, scales = int8_act_quant.reference(rows)
    values, scales = grouped_int8_gemm_swiglu.reference(
        values, scales, w13, w13_scale, sizes, limit
    )
    done = grouped_int8_gemm.reference(
        values, scales * row_weights, w2, w2_scale, sizes, torch.float32
    )
    y = moe_combine.reference(done, source, ids.shape[1], tokens_per_rank, group)
    return y.to(x.dtype), sizes
