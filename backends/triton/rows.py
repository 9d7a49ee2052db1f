"""Row-wise operators: norms, rotary embedding, Hadamard rotation, the clamped activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm(x, weight, out, n, dim, eps, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < dim
    wide = tl.load(x + row * dim + cols, mask, 0.0).to(tl.float32)
    y = wide * tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    if HAS_WEIGHT:
        y *= tl.load(weight + cols, mask, 0.0)
    tl.store(out + row * dim + cols, y.to(out.dtype.element_ty), mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As the op `rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dim = x.shape[-1]
    n = x.numel() // dim
    if n:
        block = triton.next_power_of_2(dim)
        _rms_norm[(n,)](x, weight.contiguous(), out, n, dim, eps, True, block)
    return out


def head_rms_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """As the op `head_rms_norm`, fp32 inside."""
    q = q.contiguous()
    out = torch.empty_like(q)
    dim = q.shape[-1]
    n = q.numel() // dim
    if n:
        _rms_norm[(n,)](q, q, out, n, dim, eps, False, triton.next_power_of_2(dim))
    return out


@triton.jit
def _rope(
    x, cos, sin, out, n_rows, n_heads, dim, pairs, sign,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    is_row = row < n_rows
    cols = tl.arange(0, BLOCK)[None, :]
    plain = is_row & (cols < dim - 2 * pairs)
    tl.store(out + row * dim + cols, tl.load(x + row * dim + cols, plain, 0.0), plain)
    pair = tl.arange(0, PAIRS)[None, :]
    turned = is_row & (pair < pairs)
    first = row * dim + dim - 2 * pairs + 2 * pair
    table = row // n_heads * pairs + pair
    a = tl.load(x + first, turned, 0.0).to(tl.float32)
    b = tl.load(x + first + 1, turned, 0.0).to(tl.float32)
    c = tl.load(cos + table, turned, 0.0)
    s = tl.load(sin + table, turned, 0.0) * sign
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), turned)
    tl.store(out + first + 1, (a * s + b * c).to(out.dtype.element_ty), turned)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As the op `rope`."""
    return _rotate(x, cos, sin, 1.0)


def rope_inverse(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As the op `rope_inverse`."""
    return _rotate(x, cos, sin, -1.0)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dim, pairs = x.shape[-1], cos.shape[-1]
    n_rows = x.numel() // dim
    if n_rows:
        rows = 16
        _rope[(triton.cdiv(n_rows, rows),)](
            *(x, cos.contiguous(), sin.contiguous(), out),
            *(n_rows, n_rows // x.shape[0], dim, pairs, sign),
            *(rows, triton.next_power_of_2(dim), triton.next_power_of_2(pairs)),
        )
    return out


@triton.jit
def _hadamard(
    x, out, n_rows, scale, n, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A product with the matrix, whose entries are made where they are used: 1 and -1 are exact."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    parity = col[:, None] & col[None, :]
    parity ^= parity >> 8
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    h = (1 - 2 * (parity & 1)).to(tl.float32).to(x.dtype.element_ty)
    mask = (row < n_rows)[:, None] & (col < n)[None, :]
    at = row[:, None] * n + col[None, :]
    y = tl.dot(tl.load(x + at, mask, 0.0), h, input_precision="ieee") * scale
    tl.store(out + at, y.to(out.dtype.element_ty), mask)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """As the op `hadamard`."""
    x = x.contiguous()
    out, n = torch.empty_like(x), x.shape[-1]
    if n_rows := x.numel() // n:
        rows = 16 if n_rows <= 4096 else 64
        _hadamard[(triton.cdiv(n_rows, rows),)](x, out, n_rows, n**-0.5, n, rows, max(16, n))
    return out


@triton.jit
def _swiglu(
    x, weight, out, inter_dim, limit, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < inter_dim
    at = x + row * 2 * inter_dim + cols
    gate = tl.minimum(tl.load(at, mask, 0.0).to(tl.float32), limit)
    up = tl.load(at + inter_dim, mask, 0.0).to(tl.float32)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    y = gate / (1.0 + tl.exp(-gate)) * up
    if HAS_WEIGHT:
        y *= tl.load(weight + row)
    tl.store(out + row * inter_dim + cols, y.to(out.dtype.element_ty), mask)


def swiglu(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> torch.Tensor:
    """As the op `swiglu`."""
    x = x.contiguous()
    n_rows, inter_dim = x.shape[0], x.shape[1] // 2
    out = x.new_empty(n_rows, inter_dim)
    if n_rows:
        block = min(1024, triton.next_power_of_2(inter_dim))
        scales = x if weight is None else weight.contiguous()
        _swiglu[(n_rows, triton.cdiv(inter_dim, block))](
            x, scales, out, inter_dim, limit, weight is not None, block
        )
    return out
