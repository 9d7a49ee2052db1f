"""Hyper-connections on the CPU, where small operations cost their call and little else."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from v4_ascend.ops import hc_pre


@cache
def _sums(hc: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices [hc * hc, hc * hc] that sum a flattened comb over its rows or columns.

    Every element of a row (or column) receives the sum, so that no broadcast is left.
    """
    one, eye = torch.ones(hc, hc), torch.eye(hc)
    return torch.kron(eye, one), torch.kron(one, eye)


@cache
def _part_of(hc: int) -> torch.Tensor:
    """Which of the three scales each mixing logit takes."""
    return torch.tensor([0] * hc + [1] * hc + [2] * hc * hc)


def _sinkhorn(comb: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """Normalise [n_tokens, hc, hc] as `split_sinkhorn` does: two calls for each half step."""
    flat = comb.flatten(1)
    of_row, of_column = _sums(comb.shape[-1])
    floor, total = flat.new_full((1, 1), eps), torch.empty_like(flat)
    flat = flat / torch.addmm(floor, flat, of_column)
    for _ in range(iters - 1):
        flat.div_(torch.addmm(floor, flat, of_row, out=total))
        flat.div_(torch.addmm(floor, flat, of_column, out=total))
    return flat.view_as(comb)


@hc_pre.kernel("cpu", provider="torch")
def hc_pre_flat(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run Sinkhorn on flattened combs, in place."""
    hc = x.shape[1]
    flat = x.flatten(1).float()
    mixes = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    mixes = torch.addcmul(base, mixes, scale.index_select(0, _part_of(hc)))
    pre, post, comb = mixes.split((hc, hc, hc * hc), dim=-1)
    pre, post = pre.sigmoid() + hc_eps, post.sigmoid() * 2
    comb = _sinkhorn(comb.unflatten(-1, (hc, hc)).softmax(-1) + hc_eps, sinkhorn_iters, hc_eps)
    y = torch.bmm(pre.unsqueeze(1), x.float()).squeeze(1)
    return y.to(x.dtype), post, comb
