"""The lightning indexer: scores and choice in one call, so that no scores are written."""

from __future__ import annotations

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.attention import VALID_FIRST, longest
from v4_ascend.backends.ascend.cache import why_no_page
from v4_ascend.backends.ascend.custom_ops import c_ascend
from v4_ascend.ops import RECORDS, index_select
from v4_ascend.ops.act_quant import act_quant
from v4_ascend.ops.formats import FP8, ceil_to_e8m0, scale_to_float
from v4_ascend.ops.records import INDEX_DIM, INT8_MAX

NAME = "npu_vllm_quant_lightning_indexer"
HEADS, MAX_TOPK = 64, 2048
LEAST_SCALE = 2.0**-14  # normal in fp16, which holds weights times it


def _why_not(
    want: str,
    q: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    topk: int,
) -> str | None:
    if record != want:
        return f"the record is {record}, it reads {want}"
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}, must be bf16"
    if tuple(q.shape[1:]) != (HEADS, INDEX_DIM):
        return f"q has {list(q.shape[1:])} heads and channels, must be {[HEADS, INDEX_DIM]}"
    if not 1 <= topk <= MAX_TOPK:
        return f"topk is {topk}, must be 1 to {MAX_TOPK}"
    return why_no_page("storage", storage)


def _why_no_fp8(
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
    if compress_ratio not in (1, 4, 128):
        return f"compress_ratio is {compress_ratio}, must be 1, 4 or 128"
    return _why_not("fp8_132", q, storage, record, topk)


@index_select.kernel("ascend", provider="_C_ascend", why_not=_why_no_fp8)
def lightning_indexer_fp8(
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
    """Choose by fp8 queries and keys, one power-of-two scale per query head and key."""
    if not q.shape[0]:
        return _none(q, seq_lens, compress_ratio, topk)
    values, scale = act_quant(q, INDEX_DIM)
    keys, scales = RECORDS[record].regions(storage)
    return _select(
        (values, scale_to_float(scale).squeeze(-1)),
        weights.float(),
        (keys.view(FP8), scales.view(torch.float32)),
        block_table,
        seq_lens,
        cu_seqlens,
        compress_ratio,
        topk,
    )


def _why_no_int8(
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
    if compress_ratio & (compress_ratio - 1) or not 1 <= compress_ratio <= 128:
        return f"compress_ratio is {compress_ratio}, must be a power of two up to 128"
    return _why_not("int8", q, storage, record, topk)


@index_select.kernel("ascend", provider="_C_ascend", why_not=_why_no_int8)
def lightning_indexer_int8(
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
    """Choose by int8 queries and keys, scales in fp16 as the kernel holds them.

    A query's scale is a power of two: values of the FP4 grid, which queries are on, then stay
    what they are while the scales of a head's groups are within 8 of each other.
    """
    if not q.shape[0]:
        return _none(q, seq_lens, compress_ratio, topk)
    wide = q.float()
    scale = scale_to_float(ceil_to_e8m0(wide.abs().amax(-1) / INT8_MAX)).clamp_min(LEAST_SCALE)
    values = (wide / scale.unsqueeze(-1)).round()
    keys, scales = RECORDS[record].regions(storage)
    return _select(
        (values.to(torch.int8), scale.half()),
        weights.half(),
        (keys.view(torch.int8), scales.view(torch.float16)),
        block_table,
        seq_lens,
        cu_seqlens,
        compress_ratio,
        topk,
    )


def _none(q: torch.Tensor, seq_lens: torch.Tensor, compress_ratio: int, topk: int) -> torch.Tensor:
    width = min(topk, longest(seq_lens) // compress_ratio) if len(seq_lens) else 0
    return torch.empty(0, width, dtype=torch.int32, device=q.device)


def _select(
    query: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    topk: int,
) -> torch.Tensor:
    """Call the operator; lengths are those of original tokens."""
    mode = {
        "query_quant_mode": 0,
        "key_quant_mode": 0,
        "layout_query": "TND",
        "layout_key": "PA_BSND",
        "sparse_count": topk,
        "sparse_mode": 3,  # a token sees the rows it completes, by cmp_ratio
        "cmp_ratio": compress_ratio,
    }
    # Prefix sums without the leading 0.
    ends = prepared.once(cu_seqlens, "ends", lambda: cu_seqlens[1:].contiguous())
    table = prepared.once_a_step(
        seq_lens,
        cu_seqlens,
        (NAME, topk, compress_ratio),
        lambda: c_ascend(f"{NAME}_metadata")(
            num_heads_q=HEADS,
            num_heads_k=1,
            head_dim=INDEX_DIM,
            actual_seq_lengths_query=ends,
            actual_seq_lengths_key=seq_lens,
            batch_size=seq_lens.shape[0],
            max_seqlen_q=int(cu_seqlens.diff().max()),
            max_seqlen_k=longest(seq_lens),
            pre_tokens=2**63 - 1,
            next_tokens=2**63 - 1,
            device=str(seq_lens.device),
            **mode,
        ),
    )
    # Keys and scales are views into one page each, as its writer leaves them: the operator
    # takes the stride between pages.
    ids, _ = c_ascend(NAME)(
        query[0],
        keys[0].unsqueeze(2),
        weights.contiguous(),
        query[1].contiguous(),
        keys[1],
        actual_seq_lengths_query=ends,
        actual_seq_lengths_key=seq_lens,
        block_table=block_table,
        metadata=table,
        **mode,
    )
    n_rows = longest(seq_lens) // compress_ratio
    chosen = ids.squeeze(1)[:, : min(topk, n_rows)].contiguous()
    prepared.keep(chosen, VALID_FIRST, True)
    return chosen
