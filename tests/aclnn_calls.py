"""Calls of the operators that MindSpore binds, as shapes: arguments in order, and what they return.

What they return is said by `v4_ascend.emulation.meta`, which is written after vllm-ascend's own.
"""

from dataclasses import dataclass

import torch

from v4_ascend.emulation.meta import by_name
from v4_ascend.emulation.stand_in import schemas

BF16, F32, I32, I8 = torch.bfloat16, torch.float32, torch.int32, torch.int8


@dataclass(frozen=True)
class T:
    """A tensor argument."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def t(dtype, *shape):
    return T(dtype, shape)


def _compressor(x, rows):
    weight, state = t(BF16, 1024, 4096), t(F32, 9, 4, 2048)
    angles = t(BF16, rows, 64)
    tensors = (x, weight, weight, state, t(F32, 4, 1024), t(F32, 512), angles, angles)
    return (*tensors, t(I32, 2, 8), t(I32, 3), None, t(I32, 2), 64, 4, 2, 1e-6, 2, 1)


def _attention(q, lse, *mode):
    pages, table, lengths = t(BF16, 4, 32, 1, 512), t(I32, 2, 2), t(I32, 2)
    tensors = (pages, pages, None, t(I32, 5, 1, 512), table, table, t(I32, 3), None, None, None)
    behind = (lengths, t(F32, 64), t(I32, 1024))
    return (q, *mode[:1], *tensors, *behind, *mode[1:], 0.04, 4, 4, 3, 127, 0, "TND", "PA_ND", lse)


def _indexer(layout, returns):
    key = t(I8, 4, 32, 1, 128) if layout == "PA_BSND" else t(I8, 99, 1, 128)
    query = t(I8, 5, 64, 128)
    scales = (t(torch.float16, 5, 64), t(torch.float16, 5, 64), t(torch.float16, *key.shape[:-1]))
    lengths = (t(I32, 2), t(I32, 2), t(I32, 2, 2), t(I32, 1024))
    return (query, key, *scales, 0, 0, *lengths, "TND", layout, 512, 3, 9, 9, 4, returns)


Q = t(BF16, 5, 64, 512)
LENGTHS = (t(I32, 3), None, None, None, t(I32, 2))
MASKS = (2, 5, 99, 0, 512, 4, 4, 3, 127, 0, "TND", "PA_ND", True, True)
# By operator; every call is one of each kind of answer.
CALLS = {
    "npu_hc_pre_v2": [
        (t(BF16, 3, 4, 4096), t(F32, 24, 16384), t(F32, 3), t(F32, 24), 4, 20, 1e-6, 1e-6),
        (t(BF16, 2, 3, 4, 4096), t(F32, 24, 16384), t(F32, 3), t(F32, 24), 4, 20, 1e-6, 1e-6),
    ],
    "npu_hc_post": [
        (t(BF16, 1, 3, 64), t(BF16, 1, 3, 4, 64), t(F32, 1, 3, 4), t(F32, 1, 3, 4, 4)),
    ],
    "compressor": [
        _compressor(t(BF16, 9, 4096), 4),
        _compressor(t(BF16, 2, 9, 4096), 6),
    ],
    "npu_sparse_attn_sharedkv": [_attention(Q, False), _attention(Q, True)],
    "npu_kv_quant_sparse_attn_sharedkv": [
        _attention(Q, False, 1, 64, 64), _attention(Q, True, 1, 64, 64),
    ],
    "npu_sparse_attn_sharedkv_metadata": [(64, 1, 512, *LENGTHS, *MASKS)],
    "npu_kv_quant_sparse_attn_sharedkv_metadata": [
        (64, 1, 512, 1, *LENGTHS, *MASKS[:5], 64, 64, *MASKS[5:]),
    ],
    "npu_vllm_quant_lightning_indexer": [
        _indexer("PA_BSND", False), _indexer("PA_BSND", True), _indexer("TND", False),
    ],
    "npu_vllm_quant_lightning_indexer_metadata": [
        (64, 1, 128, 0, 0, t(I32, 2), t(I32, 2), 2, 5, 99, "TND", "PA_BSND", 512, 3, 9, 9, 4),
    ],
    "moe_gating_top_k_hash": [
        (t(F32, 5, 256), 6, t(F32, 256), None, None, 1, 1, 1.5, 1e-20, 1, 0, 2, False),
    ],
}  # fmt: skip


def returned(operator, arguments):
    """What the Meta kernel says of a call: shapes and dtypes."""
    schema = torch._C.parse_schema(f"_C_ascend::{schemas()[operator][1]}")
    given = [
        torch.empty(a.shape, dtype=a.dtype, device="meta") if isinstance(a, T) else a
        for a in arguments
    ]
    names = [a.name for a in schema.arguments]
    more = {"device": "meta"} if "device" in names else {}
    out = by_name(operator, schema)(*given, **more)
    outs = out if isinstance(out, tuple) else (out,)
    return [(tuple(o.shape), o.dtype) for o in outs]
