"""What is done to each row by itself, compiled: norms, rotation, activation, cache rows."""

from __future__ import annotations

import torch

from v4_ascend.backends.cpu.compiled.library import Function, is_bf16, pointer, why_not
from v4_ascend.ops import head_rms_norm, rms_norm, rope, rope_inverse, store_rows, swiglu

_rms_norm = Function("rms_norm", "pppiifi")
_rope = Function("rope", "pppfpiiiii")
_swiglu = Function("swiglu", "pfppiii")
_store_rows = Function("store_rows", "pppiiii")


def _why_not_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    return why_not(x)


@rms_norm.kernel("cpu", provider="c++", why_not=_why_not_norm)
def rms_norm_compiled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Read each row twice, the second time from the cache."""
    x, n = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    rows = x.numel() // n if n else 0
    _rms_norm(pointer(x), pointer(weight), pointer(out), rows, n, eps, is_bf16(x))
    return out


def _why_not_head_norm(q: torch.Tensor, eps: float) -> str | None:
    return why_not(q)


@head_rms_norm.kernel("cpu", provider="c++", why_not=_why_not_head_norm)
def head_rms_norm_compiled(q: torch.Tensor, eps: float) -> torch.Tensor:
    """Keep fp32 inside."""
    q, n = q.contiguous(), q.shape[-1]
    out = torch.empty_like(q)
    _rms_norm(pointer(q), None, pointer(out), q.numel() // n, n, eps, is_bf16(q))
    return out


def _why_not_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    return why_not(x)


@rope.kernel("cpu", provider="c++", why_not=_why_not_rope)
def rope_compiled(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Copy what is not rotated, rotate pairs in fp32."""
    return _rotated(x, cos, sin, 1.0)


@rope_inverse.kernel("cpu", provider="c++", why_not=_why_not_rope)
def rope_inverse_compiled(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rope_compiled`, backwards."""
    return _rotated(x, cos, sin, -1.0)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out, n = torch.empty_like(x), x.shape[-1]
    heads = x.shape[1] if x.ndim == 3 else 1
    rows, pairs = len(x) * heads, cos.shape[-1]
    args = (rows, heads, n, pairs, is_bf16(x))
    _rope(pointer(x), pointer(cos), pointer(sin), sign, pointer(out), *args)
    return out


def _why_not_swiglu(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> str | None:
    return why_not(x)


@swiglu.kernel("cpu", provider="c++", why_not=_why_not_swiglu)
def swiglu_compiled(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> torch.Tensor:
    """Read each row once, write it once."""
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    out = x.new_empty(len(x), x.shape[1] // 2)
    args = (len(x), out.shape[1], is_bf16(x))
    _swiglu(pointer(x), limit, pointer(weight), pointer(out), *args)
    return out


def _why_not_store(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> str | None:
    return why_not(storage, rows)


@store_rows.kernel("cpu", provider="c++", why_not=_why_not_store)
def store_rows_compiled(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> torch.Tensor:
    """Copy plain rows to their slots."""
    rows, n = rows.contiguous(), rows.shape[-1]
    kinds = (is_bf16(rows), is_bf16(storage))
    slots = slot_mapping.contiguous()
    _store_rows(pointer(rows), pointer(slots), pointer(storage), len(rows), n, *kinds)
    return storage
