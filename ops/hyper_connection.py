"""Manifold-constrained hyper-connections: hc_mult residual streams around every sublayer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.ops.op import OF_DIM, ROUNDED, Case, op

HC_MULT = 4
SHAPES = ((0, 16), (1, 16), (3, 33), (16, 4096), (16, 7168))  # n_tokens, dim


def _cases(make: Any) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for n_tokens, dim in SHAPES:
            name = f"{str(dtype).removeprefix('torch.')}-{n_tokens}x{dim}"
            yield Case(
                name,
                partial(make, n_tokens=n_tokens, dim=dim, dtype=dtype),
                models=OF_DIM.get(dim, ()),
            )


def _mixer(
    g: torch.Generator, n_tokens: int, dim: int, dtype: torch.dtype, n_mixes: int, n_scales: int
) -> dict[str, Any]:
    return {
        "x": torch.randn(n_tokens, HC_MULT, dim, generator=g).to(dtype),
        "fn": torch.randn(n_mixes, HC_MULT * dim, generator=g) * (HC_MULT * dim) ** -0.5,
        "scale": torch.rand(n_scales, generator=g) + 0.5,
        "base": torch.randn(n_mixes, generator=g),
        "norm_eps": 1e-6,
        "hc_eps": 1e-6,
    }


def _pre_inputs(g: torch.Generator, n_tokens: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    return _mixer(g, n_tokens, dim, dtype, HC_MULT * (2 + HC_MULT), 3) | {"sinkhorn_iters": 20}


def _head_inputs(g: torch.Generator, n_tokens: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    return _mixer(g, n_tokens, dim, dtype, HC_MULT, 1)


def _post_inputs(g: torch.Generator, n_tokens: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(n_tokens, dim, generator=g).to(dtype),
        "residual": torch.randn(n_tokens, HC_MULT, dim, generator=g).to(dtype),
        "post": torch.rand(n_tokens, HC_MULT, generator=g) * 2,
        "comb": torch.rand(n_tokens, HC_MULT, HC_MULT, generator=g),
    }


def _mixes(x: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """Project the flattened streams, scaled by their inverse root mean square."""
    flat = x.flatten(1).float()
    return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def _collapse(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """Sum the streams weighted by `pre`; the streams themselves are not normalised."""
    return (pre.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)


def split_sinkhorn(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, iters: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split mixing logits into pre, post and a doubly stochastic comb.

    One softmax over rows and `iters` column normalisations, with `iters` - 1 row
    normalisations between them; each adds eps.

    Shapes:
        mixes   [n_tokens, hc * (2 + hc)]  fp32: pre, post, comb row by row
        scale   [3]  fp32
        base    as one row of mixes
        return  pre [n_tokens, hc], post [n_tokens, hc], comb [n_tokens, hc, hc]

    Source: DeepSeek-V4 inference/kernel.py, hc_split_sinkhorn.
    """
    hc = round((1 + mixes.shape[-1]) ** 0.5) - 1
    sizes = [hc, hc, hc * hc]
    pre, post, comb = mixes.split(sizes, dim=-1)
    pre_base, post_base, comb_base = base.split(sizes)
    pre = torch.sigmoid(pre * scale[0] + pre_base) + eps
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    comb = (comb * scale[2] + comb_base).unflatten(-1, (hc, hc)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return pre, post, comb


@op(cases=partial(_cases, _pre_inputs), tolerance=ROUNDED)
def hc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix the streams into one sublayer input, and say how its output goes back.

    Shapes (hc = 4):
        x       [n_tokens, hc, dim]  bf16 or fp32
        fn      [hc * (2 + hc), hc * dim]  fp32
        scale   [3]  fp32
        base    [hc * (2 + hc)]  fp32
        return  y [n_tokens, dim] dtype of x, post [n_tokens, hc] fp32, comb [n_tokens, hc, hc] fp32

    Source: DeepSeek-V4 inference/model.py, Block.hc_pre; technical report eq. 1-8.
    """
    mixes = _mixes(x, fn, norm_eps)
    pre, post, comb = split_sinkhorn(mixes, scale, base, sinkhorn_iters, hc_eps)
    return _collapse(x, pre), post, comb


@op(cases=partial(_cases, _post_inputs), tolerance=ROUNDED)
def hc_post(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """Add a sublayer's output to the mixed streams: ``post_k x + sum_j comb_jk residual_j``.

    The sum runs over the first index of comb.

    Shapes (hc = 4):
        x         [n_tokens, dim]  bf16 or fp32
        residual  [n_tokens, hc, dim]  as x
        post      [n_tokens, hc]  fp32
        comb      [n_tokens, hc, hc]  fp32
        return    [n_tokens, hc, dim]  dtype of residual

    Source: DeepSeek-V4 inference/model.py, Block.hc_post.
    """
    mixed = (comb.unsqueeze(-1) * residual.float().unsqueeze(2)).sum(1)
    return (post.unsqueeze(-1) * x.float().unsqueeze(1) + mixed).to(residual.dtype)


@op(cases=partial(_cases, _head_inputs), tolerance=ROUNDED)
def hc_head(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """Collapse the streams before the final norm.

    Shapes (hc = 4):
        x       [n_tokens, hc, dim]  bf16 or fp32
        fn      [hc, hc * dim]  fp32
        scale   [1]  fp32
        base    [hc]  fp32
        return  [n_tokens, dim]  dtype of x

    Source: DeepSeek-V4 inference/model.py, ParallelHead.hc_head.
    """
    return _collapse(x, torch.sigmoid(_mixes(x, fn, norm_eps) * scale + base) + hc_eps)
