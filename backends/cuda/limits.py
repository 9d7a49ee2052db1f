"""What kernels for NVIDIA's tensor cores refuse; behind them come the shared ones of `triton`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.exchange import by_group
from v4_ascend.backends.triton.limits import INDEX_RECORDS, MAX_BATCH
from v4_ascend.ops import Group, compress_kv
from v4_ascend.ops.formats import E8M0, FP8, is_mx
from v4_ascend.ops.gemm import ACT_GROUP

BF16 = torch.bfloat16
DIM = 512  # channels of a row the attention kernel is made for
KV_RECORDS = ("bf16", "fp8_584", "fp8_640")
INDEX_DIM = 128  # of packed index records
MAX_HC = 4
FP8_SINCE = (8, 9)  # compute capability
SUMS_SHORT = "out_dtype is not bfloat16: FP8 tensor cores sum too short for more"
BOTH_NARROW = "wkv and wgate in bf16"


@compress_kv.preparation("cuda")
def keep_narrow(wkv: torch.Tensor, wgate: torch.Tensor, norm_weight: torch.Tensor) -> None:
    """Keep both weights as one in bf16, if that is what the checkpoint had."""
    both = torch.cat((wkv, wgate))
    narrow = both.bfloat16()
    if bool((narrow == both).all()):
        prepared.keep(wkv, BOTH_NARROW, narrow)


@cache
def _no_fp8() -> str | None:
    """Refuse a GPU without FP8; where there is none the question is about shapes alone."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= FP8_SINCE:
        return None
    return f"{torch.cuda.get_device_name()} has no FP8: compute capability 8.9 and later has"


def _bf16(**named: torch.Tensor) -> str | None:
    for name, x in named.items():
        if x.dtype != BF16:
            return f"{name} is {str(x.dtype).removeprefix('torch.')}, must be bfloat16"
    return None


def _why_not_fp8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if out_dtype != BF16:
        return SUMS_SHORT
    if is_mx(b, b_scale):
        return "the weight is MXFP8, must be in blocks of 128 x 128"
    if a.shape[1] % ACT_GROUP:
        return f"k is {a.shape[1]}, must be a multiple of {ACT_GROUP}"
    return _no_fp8()


def _why_not_grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_sizes: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    if x_scale is not None and weight_scale is not None and weight.dtype == FP8:
        if len(weight) > 1:
            return f"{len(weight)} experts in FP8: this kernel has FP4 for several"
        return _why_not_fp8(x, x_scale, weight[0], weight_scale[0], out_dtype)
    if weight_scale is None or weight.dtype != torch.int8 or weight_scale.dtype != E8M0:
        return "the weight is neither FP4 nor one expert in FP8"
    if out_dtype != BF16:
        return SUMS_SHORT
    if x.shape[1] % ACT_GROUP:
        return f"k is {x.shape[1]}, must be a multiple of {ACT_GROUP}"
    return _no_fp8()


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
    if q.shape[-1] != DIM:
        return f"heads have {q.shape[-1]} channels, must have {DIM}"
    return _bf16(q=q) or (_no_fp8() if record != "bf16" else None)


def _why_not_select(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    *_rest: Any,
    **_named: Any,
) -> str | None:
    if record not in INDEX_RECORDS:
        return f"record {record}: this kernel reads {', '.join(INDEX_RECORDS)}"
    return _bf16(q=q, weights=weights)


def _why_not_hc(x: torch.Tensor, *_rest: Any, **_named: Any) -> str | None:
    if x.shape[1] > MAX_HC:
        return f"{x.shape[1]} streams, at most {MAX_HC}"
    return _bf16(x=x)


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
    if not prepared.has(wkv, BOTH_NARROW):
        return "the weights were not bf16 when they were prepared"
    return _bf16(x=x)


def _not_alone(group: Group) -> str | None:
    return f"{group.size} ranks: this kernel moves rows on one device" if group.size > 1 else None


_why_not_dispatch, _why_not_combine = by_group(_not_alone)

MODULES: dict[str, dict[str, Any]] = {
    "attention": {"sparse_attn": _why_not_attn},
    "indexer": {"index_topk": None, "index_select": _why_not_select},
    "compress": {"compress_kv": _why_not_compress},
    "hyper_connection": {"hc_pre": _why_not_hc},
    "gemm": {"fp8_gemm": _why_not_fp8, "grouped_gemm": _why_not_grouped},
    "moe": {
        "moe_permute": None,
        "moe_unpermute": None,
        "moe_dispatch": _why_not_dispatch,
        "moe_combine": _why_not_combine,
    },
}
