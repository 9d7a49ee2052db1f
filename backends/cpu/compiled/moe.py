"""Routing on one rank, compiled: gates, rows to their experts and back."""

from __future__ import annotations

import torch

from v4_ascend.backends.cpu.compiled.library import MISSING, Function, is_bf16, pointer, why_not
from v4_ascend.ops import Group, hash_gate, moe_combine, moe_dispatch, topk_gate

_topk_gate = Function("topk_gate", "ppppiiif")
_hash_gate = Function("hash_gate", "pppiiif")
_moe_order = Function("moe_order", "piipp")
_moe_gather = Function("moe_gather", "pppppiii")
_moe_combine = Function("moe_combine", "pppiiii")


def _require_experts(n_wrong: int, ids: torch.Tensor) -> None:
    if n_wrong:
        raise IndexError(f"{n_wrong} of {ids.numel()} expert ids are no experts")


def _why_not_topk(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, route_scale: float
) -> str | None:
    return MISSING


@topk_gate.kernel("cpu", provider="c++", why_not=_why_not_topk)
def topk_gate_compiled(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order the best `topk` of each row alone."""
    logits, bias = logits.contiguous(), bias.contiguous()
    n, n_experts = logits.shape
    weights, ids = logits.new_empty(n, topk), logits.new_empty(n, topk, dtype=torch.int64)
    _topk_gate(*map(pointer, (logits, bias, weights, ids)), n, n_experts, topk, route_scale)
    return weights, ids


def _why_not_hash(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> str | None:
    return MISSING


@hash_gate.kernel("cpu", provider="c++", why_not=_why_not_hash)
def hash_gate_compiled(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the looked-up experts alone."""
    logits = logits.contiguous()
    ids = tid2eid.index_select(0, input_ids)
    weights = logits.new_empty(ids.shape)
    args = (*logits.shape, ids.shape[1], route_scale)
    _require_experts(_hash_gate(pointer(logits), pointer(ids), pointer(weights), *args), ids)
    return weights, ids


def _why_not_dispatch(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> str | None:
    return why_not(x) or ("rows travel to other ranks" if group.size > 1 or fp8 else None)


@moe_dispatch.kernel("cpu", provider="c++", why_not=_why_not_dispatch)
def moe_dispatch_compiled(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort pairs by counting them."""
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    n_pairs, topk = ids.numel(), ids.shape[1]
    rows, row_weights = x.new_empty(n_pairs, x.shape[1]), weights.new_empty(n_pairs)
    group_sizes, source = ids.new_empty(n_experts), ids.new_empty(n_pairs)
    arrays = pointer(group_sizes), pointer(source)
    _require_experts(_moe_order(pointer(ids), n_pairs, n_experts, *arrays), ids)
    row_bytes = x.shape[1] * x.element_size()
    _moe_gather(*map(pointer, (x, weights, source, rows, row_weights)), n_pairs, topk, row_bytes)
    return rows, row_weights, group_sizes, source, torch.tensor([len(x)])


def _why_not_combine(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> str | None:
    return why_not(rows) or ("rows travel to other ranks" if group.size > 1 else None)


@moe_combine.kernel("cpu", provider="c++", why_not=_why_not_combine)
def moe_combine_compiled(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> torch.Tensor:
    """Sum rows where they are, without bringing them into the tokens' order first."""
    rows, source, dim = rows.contiguous(), source.contiguous(), rows.shape[1]
    n = len(source) // topk
    out = rows.new_empty(n, dim, dtype=torch.float32)
    _moe_combine(pointer(rows), pointer(source), pointer(out), n, topk, dim, is_bf16(rows))
    return out
