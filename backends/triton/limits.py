"""Which operator each launch function runs, and what it refuses."""

from __future__ import annotations

from typing import Any

import torch

from v4_ascend.ops.formats import FP8, is_mx
from v4_ascend.ops.gemm import ACT_GROUP

STREAMS = (torch.bfloat16, torch.float32)
KV_RECORDS = ("fp32", "bf16", "fp8_584", "fp8_640")
INDEX_RECORDS = ("fp32", "bf16", "fp4_68", "fp8_132")
MAX_BATCH = 4096  # requests of one step that a compression kernel searches in registers


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stream(**named: torch.Tensor) -> str | None:
    """Refuse what is not a stream dtype."""
    for name, x in named.items():
        if x.dtype not in STREAMS:
            return f"{name} is {_name(x.dtype)}, must be bfloat16 or float32"
    return None


def _power_of_two(what: str, n: int, least: int = 1) -> str | None:
    if n & (n - 1) or n < least:
        return f"{what} is {n}, must be a power of two from {least}"
    return None


def _any_stream(x: torch.Tensor, *_rest: Any, **_named: Any) -> str | None:
    return _stream(x=x)


def _why_not_head_norm(q: torch.Tensor, eps: float) -> str | None:
    return _stream(q=q)


def _why_not_hadamard(x: torch.Tensor) -> str | None:
    return _stream(x=x) or _power_of_two("the row length", x.shape[-1])


def _why_not_quant(x: torch.Tensor, group_size: int) -> str | None:
    if x.shape[-1] % group_size:
        return f"rows of {x.shape[-1]} are no multiple of group_size {group_size}"
    return _stream(x=x) or _power_of_two("group_size", group_size, 2)


def _why_not_kept(x: torch.Tensor, group_size: int, n_kept: int) -> str | None:
    if (x.shape[-1] - n_kept) % group_size:
        return f"{x.shape[-1] - n_kept} channels are no multiple of group_size {group_size}"
    return _stream(x=x) or _power_of_two("group_size", group_size, 2)


def _why_not_swiglu_quant(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> str | None:
    return _stream(x=x) or _depth(x.shape[1] // 2)


def _why_not_store(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> str | None:
    if record not in KV_RECORDS + INDEX_RECORDS:
        return f"record {record}: rows of another vendor's indexer"
    return _stream(rows=rows)


def _why_not_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    *_rest: Any,
    **_named: Any,
) -> str | None:
    if record not in INDEX_RECORDS:
        return f"record {record}: this kernel reads {', '.join(INDEX_RECORDS)}"
    return _stream(q=q, weights=weights)


def _why_not_attn(
    q: torch.Tensor,
    window: torch.Tensor,
    window_block_table: torch.Tensor,
    compressed: torch.Tensor | None,
    block_table: torch.Tensor | None,
    indices: torch.Tensor | None,
    record: str,
    *_rest: Any,
    **_named: Any,
) -> str | None:
    if record not in KV_RECORDS:
        return f"record {record}: this kernel reads {', '.join(KV_RECORDS)}"
    return _stream(q=q)


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
    *_rest: Any,
    **_named: Any,
) -> str | None:
    if len(seq_lens) > MAX_BATCH:
        return f"{len(seq_lens)} requests in a step, at most {MAX_BATCH}"
    return _stream(x=x)


def _depth(k: int) -> str | None:
    return f"k is {k}, must be a multiple of {ACT_GROUP}" if k % ACT_GROUP else None


def _why_not_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if out_dtype not in STREAMS:
        return f"out_dtype is {_name(out_dtype)}, must be bfloat16 or float32"
    if b.dtype == FP8 and is_mx(b, b_scale):
        return "the weight is MXFP8, must be in blocks of 128 x 128"
    return _depth(a.shape[1])


def _why_not_grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if weight_scale is None:
        return _stream(x=x, weight=weight)
    return _why_not_gemm(x, x, weight, weight_scale, out_dtype)


MODULES: dict[str, dict[str, Any]] = {
    "rows": {
        "rms_norm": _any_stream,
        "head_rms_norm": _why_not_head_norm,
        "rope": _any_stream,
        "rope_inverse": _any_stream,
        "hadamard": _why_not_hadamard,
        "swiglu": _any_stream,
    },
    "quant": {
        "act_quant": _why_not_quant,
        "fp4_act_quant": _why_not_quant,
        "fp8_round_trip": _why_not_kept,
        "fp4_round_trip": _why_not_quant,
        "swiglu_act_quant": _why_not_swiglu_quant,
    },
    "hyper_connection": {"hc_pre": _any_stream, "hc_post": _any_stream, "hc_head": _any_stream},
    "gate": {"topk_gate": None, "hash_gate": None},
    "paged": {"store_rows": _why_not_store},
    "attention": {"sparse_attn": _why_not_attn},
    "indexer": {
        "index_scores": _why_not_scores,
        "index_topk": None,
        "index_select": _why_not_scores,
    },
    "compress": {"compress_kv": _why_not_compress},
    "gemm": {
        "fp8_gemm": _why_not_gemm,
        "fp4_gemm": _why_not_gemm,
        "grouped_gemm": _why_not_grouped,
    },
}
