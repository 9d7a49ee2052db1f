"""Hyper-connections, compiled: each stream is read once where it is used."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from v4_ascend.backends.cpu.compiled.library import (
    FEW,
    MISSING,
    Function,
    is_bf16,
    pointer,
    why_not,
)
from v4_ascend.ops import hc_head, hc_post, hc_pre

_hc_pre = Function("hc_pre", "ppppppppiiiiffi")
_hc_head = Function("hc_head", "pppppiiiffi")
_hc_post = Function("hc_post", "pppppiiii")
MAX_HC = 8  # streams, as in csrc/hyper_connection.cpp


def _why_not_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> str | None:
    if x.shape[1] > MAX_HC:
        return f"{x.shape[1]} streams, at most {MAX_HC}"
    return why_not(x)


@hc_pre.kernel("cpu", provider="c++", why_not=_why_not_pre)
def hc_pre_compiled(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix, run Sinkhorn and collapse in one call; many tokens' products are torch's."""
    x = x.contiguous()
    n, hc, dim = x.shape
    if n <= FEW:
        logits = torch.empty(n, len(fn))
    else:
        logits = F.linear(x.flatten(1).float(), fn)
    y, post, comb = torch.empty(n, dim, dtype=x.dtype), torch.empty(n, hc), torch.empty(n, hc, hc)
    own_fn = pointer(fn) if n <= FEW else None
    arrays = map(pointer, (logits, scale, base, y, post, comb))
    sizes = (n, hc, dim, sinkhorn_iters)
    _hc_pre(pointer(x), own_fn, *arrays, *sizes, norm_eps, hc_eps, is_bf16(x))
    return y, post, comb


def _why_not_post(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> str | None:
    if MISSING is None and x.dtype != residual.dtype:
        return f"x is {x.dtype}, the residual {residual.dtype}"
    return why_not(x)


@hc_post.kernel("cpu", provider="c++", why_not=_why_not_post)
def hc_post_compiled(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """Read every stream once for each stream written."""
    x, residual, post, comb = (t.contiguous() for t in (x, residual, post, comb))
    out = torch.empty_like(residual)
    _hc_post(*map(pointer, (x, residual, post, comb, out)), *residual.shape, is_bf16(x))
    return out


def _why_not_head(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> str | None:
    if x.shape[1] > MAX_HC:
        return f"{x.shape[1]} streams, at most {MAX_HC}"
    return why_not(x)


@hc_head.kernel("cpu", provider="c++", why_not=_why_not_head)
def hc_head_compiled(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """Weigh and collapse in one call."""
    x = x.contiguous()
    n, hc, dim = x.shape
    y = torch.empty(n, dim, dtype=x.dtype)
    arrays = map(pointer, (x, fn, scale, base, y))
    _hc_head(*arrays, n, hc, dim, norm_eps, hc_eps, is_bf16(x))
    return y
