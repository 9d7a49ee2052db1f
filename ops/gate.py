"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from v4_ascend.ops.op import FLASH, PRO, ROUNDED, Case, op

WEIGHT_SUM_FLOOR = 1e-20  # all scores of a row may underflow; 0/0 must not reach the experts
# n_experts, topk, route_scale
ROUTERS = ((8, 3, 1.5, ()), (256, 6, 1.5, FLASH), (384, 6, 2.5, PRO))


def _scores(logits: torch.Tensor) -> torch.Tensor:
    """Compute sqrt(softplus(logits)) without overflow, and without underflow above -103."""
    softplus = logits.clamp_min(0) + torch.log1p(torch.exp(-logits.abs()))
    return softplus.sqrt()


def _normalised(weights: torch.Tensor, route_scale: float) -> torch.Tensor:
    total = weights.sum(-1, keepdim=True).clamp_min(WEIGHT_SUM_FLOOR)
    return weights / total * route_scale


def _by_expert(outputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = outputs
    order = ids.argsort(dim=-1)
    return weights.gather(-1, order), ids.gather(-1, order)


def _topk_inputs(
    g: torch.Generator, n_tokens: int, n_experts: int, topk: int, route_scale: float
) -> dict[str, Any]:
    logits = torch.randn(n_tokens, n_experts, generator=g) * 3
    logits[: n_tokens // 2] = logits[: n_tokens // 2].round()  # ties
    bias = torch.randn(n_experts, generator=g).round()
    return {"logits": logits, "bias": bias, "topk": topk, "route_scale": route_scale}


def _topk_cases() -> Iterator[Case]:
    for n_experts, topk, scale, models in ROUTERS:
        for n_tokens in (0, 1, 33):
            make = partial(
                _topk_inputs, n_tokens=n_tokens, n_experts=n_experts, topk=topk, route_scale=scale
            )
            yield Case(f"{n_tokens}x{n_experts}-top{topk}", make, models)


@op(cases=_topk_cases, tolerance=ROUNDED, canonical=_by_expert)
def topk_gate(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `topk` experts of highest ``sqrt(softplus(logit)) + bias``.

    The bias chooses and does not weigh. Ties go to the lower id, so that every backend
    chooses the same experts; the order of the chosen ones is open.

    Shapes:
        logits  [n_tokens, n_experts]  fp32
        bias    [n_experts]  fp32
        return  weights [n_tokens, topk] fp32 (they sum to route_scale), ids [n_tokens, topk] int64

    Source: DeepSeek-V4 inference/model.py, Gate.
    """
    scores = _scores(logits)
    ids = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    return _normalised(scores.gather(-1, ids), route_scale), ids


def _hash_inputs(
    g: torch.Generator, n_tokens: int, n_experts: int, topk: int, route_scale: float
) -> dict[str, Any]:
    vocab_size = 97
    table = torch.rand(vocab_size, n_experts, generator=g).argsort(-1)[:, :topk]
    return {
        "logits": torch.randn(n_tokens, n_experts, generator=g) * 3,
        "tid2eid": table.contiguous(),
        "input_ids": torch.randint(0, vocab_size, (n_tokens,), generator=g),
        "route_scale": route_scale,
    }


def _hash_cases() -> Iterator[Case]:
    for n_experts, topk, scale, models in ROUTERS:
        for n_tokens in (0, 1, 33):
            make = partial(
                _hash_inputs, n_tokens=n_tokens, n_experts=n_experts, topk=topk, route_scale=scale
            )
            yield Case(f"{n_tokens}x{n_experts}-top{topk}", make, models)


@op(cases=_hash_cases, tolerance=ROUNDED, canonical=_by_expert)
def hash_gate(
    logits: torch.Tensor, tid2eid: torch.Tensor, input_ids: torch.Tensor, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up the experts of each token id; the learned logits still weigh them.

    Shapes:
        logits     [n_tokens, n_experts]  fp32
        tid2eid    [vocab_size, topk]  int64, distinct expert ids per row
        input_ids  [n_tokens]  int64
        return     weights [n_tokens, topk] fp32, ids [n_tokens, topk] int64

    Raises:
        IndexError: a token id outside the vocabulary.

    Source: DeepSeek-V4 inference/model.py, Gate (layers below n_hash_layers).
    """
    ids = tid2eid[input_ids]
    return _normalised(_scores(logits).gather(-1, ids), route_scale), ids
