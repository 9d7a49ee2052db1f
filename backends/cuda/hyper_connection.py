"""Hyper-connections over bf16 streams: the mixing logits on tensor cores, the rest in one pass.

The weights are fp32. Three bf16 numbers hold each exactly, products of bf16 are exact in fp32:
three products with tensor cores are one of fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.cuda.device import n_processors

MIXES = 32  # of a tile: hc (2 + hc) logits and spare ones
BLOCK = 128
MAX_PARTS = 64


@triton.jit
def _mixes(
    x, fn, parts, squares, n_tokens, width, n_mixes, steps,
    TOKENS: tl.constexpr, MIXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of some tokens over one part of the flattened streams, and their squares' sum."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    mix, each = tl.arange(0, MIXES), tl.arange(0, BLOCK)
    is_token, is_mix = token < n_tokens, mix < n_mixes
    part = tl.program_id(1)
    product = tl.zeros((TOKENS, MIXES), tl.float32)
    square = tl.zeros((TOKENS,), tl.float32)
    for begin in range(part * steps * BLOCK, tl.minimum((part + 1) * steps * BLOCK, width), BLOCK):
        inside = begin + each < width
        a = tl.load(
            x + token[:, None] * width + begin + each[None, :],
            is_token[:, None] & inside[None, :], 0.0,
        )  # fmt: skip
        b = tl.load(
            fn + mix[None, :] * width + begin + each[:, None],
            is_mix[None, :] & inside[:, None],
            0.0,
        )
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(a, high, product)
        product = tl.dot(a, middle, product)
        product = tl.dot(a, low, product)
        wide = a.to(tl.float32)
        square += tl.sum(wide * wide, 1)
    at = (part * n_tokens + token[:, None]) * MIXES + mix[None, :]
    tl.store(parts + at, product, is_token[:, None])
    tl.store(squares + part * n_tokens + token, square, is_token)


@triton.jit
def _summed(parts, token, n_tokens, n_parts, index, MIXES: tl.constexpr, PARTS: tl.constexpr):
    """Logits `index` of a token, summed over the parts in their order."""
    part = tl.arange(0, PARTS)
    at = (part * n_tokens + token) * MIXES
    return tl.sum(tl.load(parts + at[:, None] + index[None, :], (part < n_parts)[:, None], 0.0), 0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _pre(
    x, parts, squares, scale, base, y, post, comb, n_tokens, dim, n_parts, norm_eps, eps,
    ITERS: tl.constexpr, HC: tl.constexpr, MIXES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some channels of one token's collapsed stream; the first program also writes the rest."""
    token = tl.program_id(0).to(tl.int64)
    part, j = tl.arange(0, PARTS), tl.arange(0, HC)
    sums = tl.load(squares + part * n_tokens + token, part < n_parts, 0.0)
    inverse = tl.rsqrt(tl.sum(sums, 0) / (dim * HC) + norm_eps)
    p = _summed(parts, token, n_tokens, n_parts, j, MIXES, PARTS) * inverse
    weight = _sigmoid(p * tl.load(scale) + tl.load(base + j)) + eps
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < dim
    at = (token * HC + j[:, None]) * dim + cols[None, :]
    streams = tl.load(x + at, mask[None, :], 0.0).to(tl.float32)
    total = tl.sum(streams * weight[:, None], 0)
    tl.store(y + token * dim + cols, total.to(y.dtype.element_ty), mask)
    if tl.program_id(1) == 0:
        p = _summed(parts, token, n_tokens, n_parts, HC + j, MIXES, PARTS) * inverse
        p = p * tl.load(scale + 1) + tl.load(base + HC + j)
        tl.store(post + token * HC + j, 2.0 * _sigmoid(p))
        flat = tl.arange(0, HC * HC)
        c = _summed(parts, token, n_tokens, n_parts, 2 * HC + flat, MIXES, PARTS) * inverse
        c = c * tl.load(scale + 2) + tl.load(base + 2 * HC + flat)
        c = tl.reshape(c, (HC, HC))
        c = tl.exp(c - tl.max(c, 1)[:, None])
        c = c / tl.sum(c, 1)[:, None] + eps
        c = c / (tl.sum(c, 0)[None, :] + eps)
        for _ in range(ITERS - 1):
            c = c / (tl.sum(c, 1)[:, None] + eps)
            c = c / (tl.sum(c, 0)[None, :] + eps)
        tl.store(comb + token * HC * HC + flat, tl.reshape(c, (HC * HC,)))


def hc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op `hc_pre`, of bf16 streams."""
    x = x.contiguous()
    n_tokens, hc, dim = x.shape
    y, width = x.new_empty(n_tokens, dim), hc * dim
    post = torch.empty(n_tokens, hc, device=x.device)
    comb = post.new_empty(n_tokens, hc, hc)
    if not n_tokens:
        return y, post, comb
    tokens = 16 if n_tokens <= 512 else 64
    tiles, blocks = triton.cdiv(n_tokens, tokens), triton.cdiv(width, BLOCK)
    # A few tokens do not keep the device busy: parts of the streams are multiplied apart.
    n_parts = max(1, min(MAX_PARTS, 2 * n_processors(x.device) // tiles, blocks))
    steps = triton.cdiv(blocks, n_parts)
    n_parts = triton.cdiv(blocks, steps)
    parts = torch.empty(n_parts, n_tokens, MIXES, device=x.device)
    squares = torch.empty(n_parts, n_tokens, device=x.device)
    _mixes[(tiles, n_parts)](
        *(x, fn.contiguous(), parts, squares, n_tokens, width, fn.shape[0], steps),
        *(tokens, MIXES, BLOCK),
        num_warps=4,
        num_stages=2,
    )
    block = min(1024, triton.next_power_of_2(dim))
    _pre[(n_tokens, triton.cdiv(dim, block))](
        *(x, parts, squares, scale, base, y, post, comb, n_tokens, dim, n_parts),
        *(norm_eps, hc_eps, sinkhorn_iters, hc, MIXES, triton.next_power_of_2(n_parts), block),
        num_warps=4,
    )
    return y, post, comb
