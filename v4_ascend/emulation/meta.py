"""Meta kernels of `_C_ascend`: what each operator returns, by shapes and dtypes alone.

torch asks them when it traces a call, and `torch.library.opcheck` compares the stand-ins with
them. Written after the vendor's own, so the two come from different texts.

Source: vllm-ascend csrc/torch_binding_meta.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

TABLE, GROUP = 1024, 128
Lengths = torch.Tensor | None

# By operator; each is given the call's arguments by name, defaults included.
META: dict[str, Callable[..., Any]] = {}


def _of(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        META.update(dict.fromkeys(names, function))
        return function

    return declare


@_of(
    "inplace_partial_rotary_mul", "npu_scatter_nd_update_v2", "kv_compress_epilog",
    "indexer_compress_epilog_v2",
)  # fmt: skip
def _in_place(**_: Any) -> None:
    """Return nothing: these write an argument."""


@_of("npu_sparse_attn_sharedkv", "npu_kv_quant_sparse_attn_sharedkv")
def _attention(
    q: torch.Tensor, return_softmax_lse: bool, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = (*q.shape[:-1], 1) if return_softmax_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


@_of("npu_vllm_quant_lightning_indexer")
def _indexer(
    query: torch.Tensor,
    key: torch.Tensor,
    layout_query: str,
    layout_key: str,
    sparse_count: int,
    return_value: bool,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    first = query.shape[: 2 if layout_query == "BSND" else 1]
    chosen = (*first, key.shape[1 if layout_key == "TND" else 2], sparse_count)
    values = query.new_empty(chosen if return_value else (0,), dtype=torch.float32)
    return query.new_empty(chosen, dtype=torch.int32), values


@_of(
    "npu_sparse_attn_sharedkv_metadata", "npu_kv_quant_sparse_attn_sharedkv_metadata",
    "npu_vllm_quant_lightning_indexer_metadata",
)  # fmt: skip
def _metadata(device: str, **arguments: Any) -> torch.Tensor:
    lengths = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    where = lengths[0].device if lengths else device
    return torch.empty(TABLE, dtype=torch.int32, device=where)


@_of("compressor")
def _compressor(
    x: torch.Tensor, norm_weight: torch.Tensor, rope_sin: torch.Tensor, cmp_ratio: int, **_: Any
) -> torch.Tensor:
    batched = x.dim() == 3
    rows = (x.shape[0], -(-x.shape[1] // cmp_ratio)) if batched else (rope_sin.shape[0],)
    return x.new_empty(*rows, norm_weight.shape[0])


@_of("compressor_metadata")
def _compressor_metadata(
    rope_cos: torch.Tensor,
    rope_sin: torch.Tensor,
    kv_block_table: torch.Tensor,
    slot_mapping_format: int,
    num_compressed_tokens: int,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = num_compressed_tokens
    angles = (n, 1, 1, rope_cos.shape[1])
    slots = (n, 2) if slot_mapping_format == 2 else (n,)
    slot_mapping = kv_block_table.new_empty(slots, dtype=torch.int32)
    return rope_cos.new_empty(angles), rope_sin.new_empty(angles), slot_mapping


@_of("npu_hc_pre_v2")
def _hc_pre(
    x: torch.Tensor, hc_mult: int, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, dim, n = x.shape[:-2], x.shape[-1], hc_mult
    y = x.new_empty(*rows, dim, dtype=torch.bfloat16)
    post = x.new_empty(*rows, n, dtype=torch.float32)
    return y, post, x.new_empty(*rows, n, n, dtype=torch.float32)


@_of("npu_hc_post")
def _hc_post(residual: torch.Tensor, **_: Any) -> torch.Tensor:
    return residual.new_empty(residual.shape)


@_of("moe_gating_top_k_hash")
def _gate(x: torch.Tensor, k: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = (x.shape[0], k)
    ids = x.new_empty(chosen, dtype=torch.int32)
    return x.new_empty(chosen), ids, x.new_empty(x.shape, dtype=torch.float32)


@_of("npu_rms_norm_dynamic_quant")
def _norm_quant(x: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # The vendor's says y has the dtype of x; its kernel, and whoever multiplies y, says int8.
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _expert_rows(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape[0], n // 2, dtype=torch.int8)
    return y, x.new_empty(x.shape[0], dtype=torch.float32)


@_of("grouped_matmul_swiglu_quant")
def _experts(
    x: torch.Tensor, weight: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_expert_rows(x, weight.shape[2]), x.new_empty((), dtype=torch.float32)


@_of("grouped_matmul_swiglu_quant_v2")
def _experts_v2(
    x: torch.Tensor, weight_scale: Sequence[torch.Tensor], **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _expert_rows(x, weight_scale[0].shape[-1])  # of int4 the weight is packed


@_of("dispatch_ffn_combine")
def _expert_layer(
    out: torch.Tensor, expert_token_nums: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return out, expert_token_nums  # which it writes


@_of("npu_swiglu_group_quant")
def _swiglu_quant(
    x: torch.Tensor, dst_type: torch.dtype, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    half = x.shape[-1] // 2
    rows = (*x.shape[:-1], half)
    scale = x.new_empty(*rows[:-1], -(-half // GROUP), dtype=torch.float32)
    return x.new_empty(rows, dtype=dst_type), scale, x.new_empty(rows)


def by_name(name: str, schema: torch.FunctionSchema) -> Callable[..., Any]:
    """Return an operator's Meta kernel as torch calls it, by position and by name."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        given |= {a.name: v for a, v in zip(schema.arguments, args, strict=False)}
        return META[name](**given | kwargs)

    return kernel
