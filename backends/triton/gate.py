"""Routing: learned top-k with ties to the lower expert, and hashed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WEIGHT_SUM_FLOOR = tl.constexpr(1e-20)


@triton.jit
def _score(logit):
    """sqrt(softplus(logit)), accurate where softplus is tiny."""
    x = tl.exp(-tl.abs(logit))
    u = 1.0 + x
    # log1p by Kahan: the rounding of 1 + x is divided out again.
    tail = tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.sqrt(tl.maximum(logit, 0.0) + tail)


@triton.jit
def _topk_gate(
    logits, bias, weights, ids, n_experts, topk, route_scale,
    TOPK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    mask = expert < n_experts
    score = _score(tl.load(logits + token * n_experts + expert, mask, 0.0))
    left = tl.where(mask, score + tl.load(bias + expert, mask, 0.0), float("-inf"))
    slot = tl.arange(0, TOPK)
    chosen = tl.zeros((TOPK,), tl.float32)
    names = tl.zeros((TOPK,), tl.int32)
    for k in range(topk):
        best = tl.max(left, 0)
        # Of equal ones the lower; an expert taken already is -inf and no longer inside.
        name = tl.min(tl.where((left == best) & mask, expert, BLOCK), 0)
        weight = tl.sum(tl.where(expert == name, score, 0.0), 0)
        chosen = tl.where(slot == k, weight, chosen)
        names = tl.where(slot == k, name, names)
        mask = mask & (expert != name)
        left = tl.where(expert == name, float("-inf"), left)
    total = tl.maximum(tl.sum(chosen, 0), WEIGHT_SUM_FLOOR)
    at = token * topk + slot
    tl.store(weights + at, chosen / total * route_scale, slot < topk)
    tl.store(ids + at, names.to(tl.int64), slot < topk)


def topk_gate(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op `topk_gate`."""
    n_tokens, n_experts = logits.shape
    weights = torch.empty(n_tokens, topk, device=logits.device)
    ids = torch.empty(n_tokens, topk, dtype=torch.int64, device=logits.device)
    if n_tokens:
        tile = (triton.next_power_of_2(topk), triton.next_power_of_2(n_experts))
        _topk_gate[(n_tokens,)](
            logits.contiguous(), bias, weights, ids, n_experts, topk, route_scale, *tile
        )
    return weights, ids


@triton.jit
def _hash_gate(
    logits, tid2eid, input_ids, weights, ids, n_experts, topk, route_scale, TOPK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, TOPK)
    mask = slot < topk
    expert = tl.load(tid2eid + tl.load(input_ids + token) * topk + slot, mask, 0)
    score = _score(tl.load(logits + token * n_experts + expert, mask, 0.0))
    score = tl.where(mask, score, 0.0)
    total = tl.maximum(tl.sum(score, 0), WEIGHT_SUM_FLOOR)
    tl.store(weights + token * topk + slot, score / total * route_scale, mask)
    tl.store(ids + token * topk + slot, expert, mask)


def hash_gate(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op `hash_gate`; ids outside the vocabulary are the embedding's to refuse."""
    (n_tokens, n_experts), topk = logits.shape, tid2eid.shape[1]
    weights = torch.empty(n_tokens, topk, device=logits.device)
    ids = torch.empty(n_tokens, topk, dtype=torch.int64, device=logits.device)
    if n_tokens:
        _hash_gate[(n_tokens,)](
            *(logits.contiguous(), tid2eid.contiguous(), input_ids, weights, ids),
            *(n_experts, topk, route_scale, triton.next_power_of_2(topk)),
        )
    return weights, ids
