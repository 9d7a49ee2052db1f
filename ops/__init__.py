"""Operators of DeepSeek-V4: what each one means, on CPU, in plain torch.

Each operator is declared once, by its reference function; `OPS` holds them all by name.
"""

from v4_ascend.ops.act_quant import act_quant, fp4_act_quant, fp4_round_trip, fp8_round_trip
from v4_ascend.ops.compress_kv import compress_kv
from v4_ascend.ops.expert_layer import expert_layer
from v4_ascend.ops.gate import hash_gate, topk_gate
from v4_ascend.ops.gemm import fp4_gemm, fp8_gemm, grouped_gemm, heads_gemm, linear
from v4_ascend.ops.hadamard import hadamard
from v4_ascend.ops.hyper_connection import hc_head, hc_post, hc_pre
from v4_ascend.ops.indexer import index_scores, index_select, index_topk
from v4_ascend.ops.int8 import grouped_int8_gemm, int8_act_quant, int8_gemm
from v4_ascend.ops.int8_fused import grouped_int8_gemm_swiglu, rms_norm_int8
from v4_ascend.ops.moe import Group, Solo, moe_combine, moe_dispatch, moe_permute, moe_unpermute
from v4_ascend.ops.new_rows import new_rows
from v4_ascend.ops.op import OPS, use_policy
from v4_ascend.ops.records import RECORDS, store_rows
from v4_ascend.ops.rms_norm import head_rms_norm, rms_norm
from v4_ascend.ops.rope import rope, rope_inverse
from v4_ascend.ops.sample import sample
from v4_ascend.ops.sparse_attn import sparse_attn
from v4_ascend.ops.swiglu import swiglu, swiglu_act_quant

__all__ = [
    "OPS",
    "RECORDS",
    "Group",
    "Solo",
    "act_quant",
    "compress_kv",
    "expert_layer",
    "fp4_act_quant",
    "fp4_gemm",
    "fp4_round_trip",
    "fp8_gemm",
    "fp8_round_trip",
    "grouped_gemm",
    "grouped_int8_gemm",
    "grouped_int8_gemm_swiglu",
    "hadamard",
    "hash_gate",
    "hc_head",
    "hc_post",
    "hc_pre",
    "head_rms_norm",
    "heads_gemm",
    "index_scores",
    "index_select",
    "index_topk",
    "int8_act_quant",
    "int8_gemm",
    "linear",
    "moe_combine",
    "moe_dispatch",
    "moe_permute",
    "moe_unpermute",
    "new_rows",
    "rms_norm",
    "rms_norm_int8",
    "rope",
    "rope_inverse",
    "sample",
    "sparse_attn",
    "store_rows",
    "swiglu",
    "swiglu_act_quant",
    "topk_gate",
    "use_policy",
]

if __name__ != "v4_ascend.ops":
    raise ImportError(f"import v4_ascend.ops, not {__name__}")
