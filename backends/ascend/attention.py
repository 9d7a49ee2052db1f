"""Attention over window and compressed rows: fp8 rows on 950, bf16 rows on A2 and A3."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.cache import why_no_page
from v4_ascend.backends.ascend.custom_ops import c_ascend
from v4_ascend.ops import sparse_attn
from v4_ascend.ops.formats import FP8
from v4_ascend.ops.ragged import locate
from v4_ascend.ops.records import KV_DIM, KV_GROUP, ROPE_DIM

CHOICES = (512, 1024)  # how many chosen rows a call takes: index_topk of Flash and of Pro
VALID_FIRST = "valid ids first"  # of chosen rows: -1 only behind them
QUANT = {"kv_quant_mode": 1, "tile_size": KV_GROUP, "rope_head_dim": ROPE_DIM}


def _why_not(
    want: str,
    q: torch.Tensor,
    window: torch.Tensor,
    compressed: torch.Tensor | None,
    indices: torch.Tensor | None,
    record: str,
    compress_ratio: int,
) -> str | None:
    if record != want:
        return f"the record is {record}, it reads {want}"
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}, must be bf16"
    if q.shape[-1] != KV_DIM:
        return f"head_dim is {q.shape[-1]}, must be {KV_DIM}"
    if compressed is not None and compress_ratio not in (4, 128):
        return f"compress_ratio is {compress_ratio}, must be 4 or 128"
    if indices is not None and indices.shape[1] > CHOICES[-1]:
        return f"{indices.shape[1]} rows are chosen, at most {CHOICES[-1]} can be"
    pages = why_no_page("window", window)
    return pages or (why_no_page("compressed", compressed) if compressed is not None else None)


def _why_no_fp8(
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
    if q.shape[1] not in (64, 128):
        return f"{q.shape[1]} heads, must be 64 or 128: attention TP 1 for Flash, at most 2 for Pro"
    if window_size != 128:
        return f"window_size is {window_size}, must be 128"
    return _why_not("fp8_640", q, window, compressed, indices, record, compress_ratio)


@sparse_attn.kernel("ascend", provider="_C_ascend", why_not=_why_no_fp8)
def kv_quant_sparse_attn_sharedkv(
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
    """Attend to fp8 rows of 640 bytes; they are widened to bf16 inside."""
    fp8_window = window.view(FP8)
    fp8_rows = None if compressed is None else compressed.view(FP8)
    return _attend(
        "npu_kv_quant_sparse_attn_sharedkv",
        QUANT,
        q,
        (fp8_window, window_block_table),
        (fp8_rows, block_table),
        indices,
        (seq_lens, cu_seqlens),
        sink,
        softmax_scale,
        window_size,
        compress_ratio,
    )


def _why_no_bf16(
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
    if q.shape[1] % 4 or not 0 < q.shape[1] <= 128:
        return f"{q.shape[1]} heads, must be a multiple of 4 up to 128"
    return _why_not("bf16", q, window, compressed, indices, record, compress_ratio)


@sparse_attn.kernel("ascend", provider="_C_ascend", why_not=_why_no_bf16)
def sparse_attn_sharedkv(
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
    """Attend to bf16 rows."""
    return _attend(
        "npu_sparse_attn_sharedkv",
        {},
        q,
        (window, window_block_table),
        (compressed, block_table),
        indices,
        (seq_lens, cu_seqlens),
        sink,
        softmax_scale,
        window_size,
        compress_ratio,
    )


def _attend(
    name: str,
    quant: dict[str, int],
    q: torch.Tensor,
    window: tuple[torch.Tensor, torch.Tensor],
    rows: tuple[torch.Tensor | None, torch.Tensor | None],
    indices: torch.Tensor | None,
    lengths: tuple[torch.Tensor, torch.Tensor],
    sink: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    compress_ratio: int,
) -> torch.Tensor:
    """Call either operator: without rows SWA, with them HCA, with chosen ones CSA."""
    if not q.shape[0]:
        return torch.empty_like(q)
    seq_lens, cu_seqlens = lengths
    has_rows = rows[0] is not None
    chosen = None
    if has_rows and (indices is not None or compress_ratio == 4):
        chosen = _chosen(indices, seq_lens, cu_seqlens, compress_ratio)
    mode: dict[str, Any] = {
        "cmp_ratio": compress_ratio if has_rows else 1,
        "ori_mask_mode": 4,  # a window
        "cmp_mask_mode": 3,  # rows that are complete
        "ori_win_left": window_size - 1,
        "ori_win_right": 0,
        "layout_q": "TND",
        "layout_kv": "PA_ND",
    }
    topk = chosen.shape[-1] if chosen is not None else 0
    table = prepared.once_a_step(
        seq_lens,
        cu_seqlens,
        (name, q.shape[1], topk, compress_ratio),
        lambda: _metadata(name, quant, q, seq_lens, cu_seqlens, topk, mode, has_rows),
    )
    if rows[0] is not None:
        mode |= {"cmp_kv": rows[0].unsqueeze(2), "cmp_block_table": rows[1]}
    out, _ = c_ascend(name)(
        q.contiguous(),
        ori_kv=window[0].unsqueeze(2),
        cmp_sparse_indices=chosen,
        ori_block_table=window[1],
        cu_seqlens_q=cu_seqlens,
        seqused_kv=seq_lens,
        sinks=sink,
        metadata=table,
        softmax_scale=softmax_scale,
        **mode,
        **quant,
    )
    return out


def _metadata(
    name: str,
    quant: dict[str, int],
    q: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    topk: int,
    mode: dict[str, Any],
    has_rows: bool,
) -> torch.Tensor:
    """Let the vendor cut the work for its cores: once per step and kind of layer."""
    return c_ascend(f"{name}_metadata")(
        num_heads_q=q.shape[1],
        num_heads_kv=1,
        head_dim=q.shape[2],
        cu_seqlens_q=cu_seqlens,
        seqused_kv=seq_lens,
        batch_size=seq_lens.shape[0],
        max_seqlen_q=int(cu_seqlens.diff().max()),
        max_seqlen_kv=longest(seq_lens),
        cmp_topk=topk,
        has_ori_kv=True,
        has_cmp_kv=has_rows,
        device=str(q.device),
        **mode,
        **quant,
    )


def longest(seq_lens: torch.Tensor) -> int:
    """Return the longest sequence of a step: one look at the device, then remembered."""
    return prepared.once(seq_lens, "longest", lambda: int(seq_lens.max()))


def _chosen(
    indices: torch.Tensor | None,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
) -> torch.Tensor:
    """Return chosen rows [n_tokens, 1, 512 or 1024], -1 behind them."""
    if indices is None:  # a CSA layer before there is a choice: all rows that are complete
        return prepared.once_a_step(
            seq_lens,
            cu_seqlens,
            ("all rows", compress_ratio),
            lambda: _all_rows(seq_lens, cu_seqlens, compress_ratio),
        )
    if not prepared.has(indices, VALID_FIRST):
        indices = indices.sort(dim=-1, descending=True).values
    width = next(c for c in CHOICES if indices.shape[1] <= c)
    return F.pad(indices, (0, width - indices.shape[1]), value=-1).unsqueeze(1).contiguous()


def _all_rows(
    seq_lens: torch.Tensor, cu_seqlens: torch.Tensor, compress_ratio: int
) -> torch.Tensor:
    n_rows = longest(seq_lens) // compress_ratio
    if n_rows > CHOICES[-1]:
        raise ValueError(f"sparse_attn: {n_rows} rows and no indices; at most {CHOICES[-1]} fit")
    width = next(c for c in CHOICES if n_rows <= c)
    row = torch.arange(width, dtype=torch.int32, device=seq_lens.device)
    _, position = locate(seq_lens, cu_seqlens)
    visible = ((position + 1) // compress_ratio).unsqueeze(-1)
    return row.where(row < visible, row.new_full((), -1)).unsqueeze(1).contiguous()
