"""Hyper-connections: mixing logits in one product, then Sinkhorn and the streams' sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 16  # of a product's tile
HC = 4


@triton.jit
def _mixes(
    x, fn, mixes, n_tokens, width, n_mixes, eps,
    TOKENS: tl.constexpr, MIXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [n_tokens, n_mixes]: flattened streams times fn, over their root mean square."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    mix = tl.arange(0, MIXES)
    is_token, is_mix = token < n_tokens, mix < n_mixes
    product = tl.zeros((TOKENS, MIXES), tl.float32)
    square = tl.zeros((TOKENS,), tl.float32)
    for begin in range(0, width, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        inside = cols < width
        a = tl.load(
            x + token[:, None] * width + cols[None, :], is_token[:, None] & inside[None, :], 0.0
        ).to(tl.float32)
        b = tl.load(
            fn + mix[None, :] * width + cols[:, None], is_mix[None, :] & inside[:, None], 0.0
        )
        product = tl.dot(a, b, product, input_precision="ieee")
        square += tl.sum(a * a, 1)
    product *= tl.rsqrt(square / width + eps)[:, None]
    at = token[:, None] * n_mixes + mix[None, :]
    tl.store(mixes + at, product, is_token[:, None] & is_mix[None, :])


def mixing_logits(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    """Return logits fp32 [n_tokens, n_mixes] of streams [n_tokens, hc, dim]."""
    n_tokens, n_mixes, width = x.shape[0], fn.shape[0], x.shape[1] * x.shape[2]
    mixes = torch.empty(n_tokens, n_mixes, device=x.device)
    grid = (triton.cdiv(n_tokens, TOKENS),)
    tile = (TOKENS, max(16, triton.next_power_of_2(n_mixes)), 128)
    _mixes[grid](x, fn.contiguous(), mixes, n_tokens, width, n_mixes, eps, *tile)
    return mixes


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _split_sinkhorn(
    mixes, scale, base, pre, post, comb, eps, ITERS: tl.constexpr, HC: tl.constexpr
):  # fmt: skip
    """One token's pre, post and doubly stochastic comb."""
    token = tl.program_id(0).to(tl.int64)
    mixes += token * (2 + HC) * HC
    j = tl.arange(0, HC)
    p = tl.load(mixes + j) * tl.load(scale) + tl.load(base + j)
    tl.store(pre + token * HC + j, _sigmoid(p) + eps)
    p = tl.load(mixes + HC + j) * tl.load(scale + 1) + tl.load(base + HC + j)
    tl.store(post + token * HC + j, 2.0 * _sigmoid(p))
    at = j[:, None] * HC + j[None, :]
    c = tl.load(mixes + 2 * HC + at) * tl.load(scale + 2) + tl.load(base + 2 * HC + at)
    c = tl.exp(c - tl.max(c, 1)[:, None])
    c = c / tl.sum(c, 1)[:, None] + eps
    c = c / (tl.sum(c, 0)[None, :] + eps)
    for _ in range(ITERS - 1):
        c = c / (tl.sum(c, 1)[:, None] + eps)
        c = c / (tl.sum(c, 0)[None, :] + eps)
    tl.store(comb + token * HC * HC + at, c)


@triton.jit
def _collapse(x, pre, out, dim, HC: tl.constexpr, BLOCK: tl.constexpr):
    """Sum one token's streams, weighted by pre."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < dim
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(HC):
        stream = tl.load(x + (token * HC + k) * dim + cols, mask, 0.0).to(tl.float32)
        total += tl.load(pre + token * HC + k) * stream
    tl.store(out + token * dim + cols, total.to(out.dtype.element_ty), mask)


def _collapsed(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    n_tokens, hc, dim = x.shape
    out = x.new_empty(n_tokens, dim)
    block = min(1024, triton.next_power_of_2(dim))
    _collapse[(n_tokens, triton.cdiv(dim, block))](x, pre, out, dim, hc, block)
    return out


def hc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op `hc_pre`."""
    x = x.contiguous()
    n_tokens, hc, _ = x.shape
    pre = torch.empty(n_tokens, hc, device=x.device)
    post, comb = torch.empty_like(pre), pre.new_empty(n_tokens, hc, hc)
    if not n_tokens:
        return x[:, 0], post, comb
    mixes = mixing_logits(x, fn, norm_eps)
    _split_sinkhorn[(n_tokens,)](
        mixes, scale, base, pre, post, comb, hc_eps, sinkhorn_iters, hc, num_warps=1
    )
    return _collapsed(x, pre), post, comb


@triton.jit
def _head_weights(mixes, scale, base, pre, eps, HC: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, HC)
    p = tl.load(mixes + token * HC + j) * tl.load(scale) + tl.load(base + j)
    tl.store(pre + token * HC + j, _sigmoid(p) + eps)


def hc_head(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """As the op `hc_head`."""
    x = x.contiguous()
    n_tokens, hc, _ = x.shape
    if not n_tokens:
        return x[:, 0]
    pre = torch.empty(n_tokens, hc, device=x.device)
    mixes = mixing_logits(x, fn, norm_eps)
    _head_weights[(n_tokens,)](mixes, scale, base, pre, hc_eps, hc, num_warps=1)
    return _collapsed(x, pre)


@triton.jit
def _hc_post(x, residual, post, comb, out, dim, HC: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < dim
    y = tl.load(x + token * dim + cols, mask, 0.0).to(tl.float32)
    for k in tl.static_range(HC):
        total = tl.load(post + token * HC + k) * y
        for j in tl.static_range(HC):
            stream = tl.load(residual + (token * HC + j) * dim + cols, mask, 0.0).to(tl.float32)
            total += tl.load(comb + (token * HC + j) * HC + k) * stream
        tl.store(out + (token * HC + k) * dim + cols, total.to(out.dtype.element_ty), mask)


def hc_post(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """As the op `hc_post`."""
    residual = residual.contiguous()
    out = torch.empty_like(residual)
    n_tokens, hc, dim = residual.shape
    if n_tokens:
        block = min(1024, triton.next_power_of_2(dim))
        _hc_post[(n_tokens, triton.cdiv(dim, block))](
            *(x.contiguous(), residual, post.contiguous(), comb.contiguous(), out, dim, hc, block)
        )
    return out
