"""Attention token by token, compiled: rows are read where they lie in their pages."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from v4_ascend.backends.cpu.compiled.gemm import FEW_ROWS, plain_product
from v4_ascend.backends.cpu.compiled.library import (
    FEW,
    IS_WIDE,
    MISSING,
    Function,
    is_bf16,
    pointer,
    why_not,
)
from v4_ascend.backends.cpu.compiled.rows import rms_norm_compiled, rope_compiled
from v4_ascend.ops import compress_kv, index_select, sparse_attn

_sparse_attn = Function("sparse_attn", "pppiippiipippipfiipiiii")
_index_select = Function("index_select", "ppppiippiiiiipi")
_compress_kv = Function("compress_kv", "pppppppiiiiip")
_masked_softmax = Function("masked_softmax", "pppfiiipi")
DECODED = 2  # tokens a sequence brings while it decodes, its draft among them
# Rows behind the window that all tokens see, from which on products of tiles are faster.
SHARED_ROWS = 512


def _is_decode(n_tokens: int, seq_lens: torch.Tensor) -> str | None:
    if n_tokens > max(FEW, DECODED * len(seq_lens)):
        return f"{n_tokens} tokens of {len(seq_lens)} sequences: matrix products serve them faster"
    return None


def _why_not_attend(
    q: torch.Tensor,
    window: torch.Tensor,
    window_block_table: torch.Tensor,
    compressed: torch.Tensor | None,
    block_table: torch.Tensor | None,
    indices: torch.Tensor | None,
    record: str,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sink: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    compress_ratio: int,
) -> str | None:
    if not IS_WIDE:
        return why_not(q, window) or _is_decode(len(q), seq_lens)
    shared = 0
    if compressed is not None and block_table is not None and indices is None:
        shared = block_table.shape[1] * compressed.shape[1]
    return why_not(q, window) or (_is_decode(len(q), seq_lens) if shared > SHARED_ROWS else None)


@sparse_attn.kernel("cpu", provider="c++", why_not=_why_not_attend)
def sparse_attn_gathered(
    q: torch.Tensor,
    window: torch.Tensor,
    window_block_table: torch.Tensor,
    compressed: torch.Tensor | None,
    block_table: torch.Tensor | None,
    indices: torch.Tensor | None,
    record: str,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sink: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    compress_ratio: int,
) -> torch.Tensor:
    """Four heads share each read of a row; nothing is gathered into another place."""
    q, near = q.contiguous(), window_block_table.contiguous()
    far = None if block_table is None else block_table.contiguous()
    ids = None if indices is None else indices.contiguous()
    out = torch.empty_like(q)
    _sparse_attn(
        *(pointer(q), pointer(window), pointer(near), near.shape[1], window.shape[1]),
        *(pointer(compressed), pointer(far), 0 if far is None else far.shape[1]),
        1 if compressed is None else compressed.shape[1],
        *(pointer(ids), 0 if ids is None else ids.shape[1]),
        *(pointer(seq_lens), pointer(cu_seqlens), len(seq_lens)),
        *(pointer(sink), softmax_scale, window_size, compress_ratio, pointer(out)),
        *(q.shape[1], q.shape[2], is_bf16(q), is_bf16(window)),
    )
    return out


def masked_softmax(
    scores: torch.Tensor,
    is_visible: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Make scores [n_tokens, n_heads, n_rows] probabilities in place, rounded to `dtype`.

    Return what divides their sums, [n_tokens, n_heads]. Each token sees at least one row.
    """
    divisor, mask = torch.empty(scores.shape[:2]), is_visible.contiguous()
    arrays = map(pointer, (scores, mask, sink))
    sizes = (*scores.shape, pointer(divisor), dtype == torch.bfloat16)
    _masked_softmax(*arrays, scale, *sizes)
    return divisor


def _why_not_select(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    topk: int,
) -> str | None:
    if MISSING is None and not q.dtype == weights.dtype == storage.dtype:
        return f"q is {q.dtype}, weights {weights.dtype}, keys {storage.dtype}"
    return why_not(q) or (None if IS_WIDE else _is_decode(len(q), seq_lens))


@index_select.kernel("cpu", provider="c++", why_not=_why_not_select)
def index_select_compiled(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    topk: int,
) -> torch.Tensor:
    """Score each token's rows where they lie, find the threshold, take what is above it.

    Tokens of a prompt share a look at sixteen keys, and no scores leave the cache.

    As wide as what the table can hold, or topk: lengths are not looked at here.
    """
    q, weights, table = q.contiguous(), weights.contiguous(), block_table.contiguous()
    topk = min(topk, table.shape[1] * storage.shape[1])
    ids = torch.empty(len(q), topk, dtype=torch.int32)
    if topk:
        _index_select(
            *map(pointer, (q, weights, storage, table)),
            *(table.shape[1], storage.shape[1], pointer(seq_lens), pointer(cu_seqlens)),
            *(len(seq_lens), q.shape[1], q.shape[2], compress_ratio, topk, pointer(ids)),
            is_bf16(q),
        )
    return ids


def _why_not_compress(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    state: torch.Tensor,
    state_slots: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    norm_eps: float,
) -> str | None:
    return why_not(x)


@compress_kv.kernel("cpu", provider="c++", why_not=_why_not_compress)
def compress_kv_compiled(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    state: torch.Tensor,
    state_slots: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool all requests' groups from the step's tokens and the state, where they lie."""
    if len(x) <= FEW_ROWS[torch.float32]:
        sizes = torch.tensor([len(x)])
        kv, score = (plain_product(x, w.unsqueeze(0), sizes, torch.float32) for w in (wkv, wgate))
    else:
        wide = x.float()
        kv, score = F.linear(wide, wkv), F.linear(wide, wgate)
    head_dim, width = len(norm_weight), ape.shape[1]
    pooled = torch.zeros(len(cos), head_dim)
    _compress_kv(
        *map(pointer, (kv, score, ape, state, state_slots, seq_lens, cu_seqlens)),
        *(len(seq_lens), compress_ratio, head_dim, width, state.shape[1], pointer(pooled)),
    )
    normed = rms_norm_compiled(pooled.to(x.dtype), norm_weight, norm_eps)
    return rope_compiled(normed, cos, sin), state
