"""Which vendor operator runs what on which chip: one table, and the order that follows.

Sources are sections of the vendor's published code and documents: VA is vllm-ascend
(csrc/torch_binding.cpp, csrc/build_aclnn.sh, operator READMEs), OPD op-plugin's
docs/zh/custom_APIs, OT CANN's ops-transformer.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from v4_ascend.backends.ascend import custom_ops
from v4_ascend.errors import ConfigError
from v4_ascend.ops import OPS
from v4_ascend.ops.op import Kernel, Op

log = logging.getLogger(__name__)
A2, A3, A5 = "a2", "a3", "950"
CHIPS = (A2, A3, A5)
NARROW_CHIPS = (A5,)  # that compute in fp8 and fp4
# Which need such a chip.
NARROW_OPS = (
    *("act_quant", "fp4_act_quant", "swiglu_act_quant", "fp8_gemm", "fp4_gemm"),
    *("fp8_round_trip", "fp4_round_trip"),
)
WHOLE = ("expert_layer",)  # where no kernel takes them, models call their parts
PROVIDERS = ("_C_ascend", "torch_npu", "triton", "torch")  # the order in which they are tried
# What users, tools and torch_npu call a chip: Atlas A2, Ascend910B3, 910_9391, ascend-950dt-96.
NAMES = (
    (A5, r"(a5|950(pr|dt)?)([-_]\w+)?"),
    (A3, r"(a3|910c|910_93\w*)([-_]\w+)?"),
    (A2, r"(a2|910b(\d\w*)?)([-_]\w+)?"),
)
SOC_VERSIONS = {A2: range(220, 226), A3: range(250, 256), A5: range(260, 261)}


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel: what it calls, and where that works.

    Attributes:
        kernel: the name it is registered by.
        vendor: namespace and name of the operator it calls.
        beside: others it calls with it.
        before: others called once, when its weights are loaded.
        limits: what its `why_not` refuses, in words.
        cann: the versions known to work.
    """

    op: str
    chips: tuple[str, ...]
    kernel: str
    vendor: str
    limits: str
    source: str
    cann: str
    beside: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


TILES = ("npu::npu_format_cast",)
V4_CANN = {A2: ">= 8.5.1", A3: ">= 8.5.1", A5: ">= 9.1.0"}
_ALL, _OLD, _NEW = ">= 8.5.1; 950: >= 9.1.0", ">= 8.5.1", ">= 9.1.0"


def _custom(
    op: str, chips: tuple[str, ...], kernel: str, name: str, limits: str, *beside: str
) -> Row:
    cann = {CHIPS: _ALL, (A2, A3): _OLD, (A3,): _OLD, (A5,): _NEW}[chips]
    others = tuple(f"_C_ascend::{other}" for other in beside)
    return Row(op, chips, kernel, f"_C_ascend::{name}", limits, f"VA {name}", cann, others)


TABLE: tuple[Row, ...] = (
    _custom(
        "store_rows", (A5,), "kv_compress_epilog", "kv_compress_epilog",
        "record fp8_640, bf16 rows of 512",
    ),
    _custom(
        "store_rows", (A5,), "indexer_compress_epilog", "indexer_compress_epilog_v2",
        "record fp8_132, bf16 rows of 128, pages of 16 n rows",
    ),
    _custom(
        "store_rows", (A2, A3), "scatter_nd_update", "npu_scatter_nd_update_v2",
        "records bf16 and int8",
    ),
    _custom(
        "sparse_attn", (A5,), "kv_quant_sparse_attn_sharedkv", "npu_kv_quant_sparse_attn_sharedkv",
        "record fp8_640, 64 or 128 heads of 512, window 128, pages of 16 n rows, top 1024",
        "npu_kv_quant_sparse_attn_sharedkv_metadata",
    ),
    _custom(
        "sparse_attn", (A2, A3), "sparse_attn_sharedkv", "npu_sparse_attn_sharedkv",
        "record bf16, 4 n heads of 512, pages of 16 n rows, top 1024",
        "npu_sparse_attn_sharedkv_metadata",
    ),
    _custom(
        "index_select", (A5,), "lightning_indexer_fp8", "npu_vllm_quant_lightning_indexer",
        "record fp8_132, 64 heads of 128, top 2048, compress_ratio 1, 4 or 128",
        "npu_vllm_quant_lightning_indexer_metadata",
    ),
    _custom(
        "index_select", (A2, A3), "lightning_indexer_int8", "npu_vllm_quant_lightning_indexer",
        "record int8, 64 heads of 128, top 2048; weights times scales must fit fp16",
        "npu_vllm_quant_lightning_indexer_metadata",
    ),
    _custom(
        "compress_kv", CHIPS, "compressor", "compressor",
        "bf16, dim 512 n from 1024 to 10240, head_dim 512 or 128, weights that bf16 holds",
        "inplace_partial_rotary_mul",
    ),
    _custom(
        "new_rows", CHIPS, "compressor_metadata", "compressor_metadata",
        "512 bytes of tables for each position",
    ),
    _custom(
        "hc_pre", CHIPS, "fused_hc_pre", "npu_hc_pre_v2", "bf16, dim 4096 or 7168, 4 streams"
    ),
    _custom("hc_post", CHIPS, "fused_hc_post", "npu_hc_post", "bf16, 4 streams, dim 16 n"),
    Row(
        "hc_pre", (A5,), "mhc_pre", "npu::npu_mhc_pre",
        "bf16, 4 streams, dim 16 n up to 16384", "OPD npu_mhc_pre", _NEW,
        ("npu::npu_mhc_sinkhorn",),
    ),
    Row(
        "hc_post", (A5,), "mhc_post", "npu::npu_mhc_post",
        "bf16, 4 streams, dim 16 n up to 16384", "OPD npu_mhc_post", _NEW,
    ),
    _custom(
        "topk_gate", CHIPS, "gating_top_k_hash", "moe_gating_top_k_hash",
        "fp32 logits, top 64 of 2048",
    ),
    _custom(
        "hash_gate", CHIPS, "gating_hash", "moe_gating_top_k_hash", "fp32 logits, top 64 of 2048"
    ),
    Row(
        "topk_gate", (A5,), "gating_top_k", "npu::npu_moe_gating_top_k",
        "fp32 logits, top 64 of 2048", "OT moe/moe_gating_top_k", _NEW,
    ),
    Row(
        "hash_gate", (A5,), "stock_gating_hash", "npu::npu_moe_gating_top_k",
        "fp32 logits, top 64 of 2048", "OT moe/moe_gating_top_k", _NEW,
    ),
    _custom(
        "rope", CHIPS, "inplace_partial_rotary_mul", "inplace_partial_rotary_mul", "fp32 tables"
    ),
    _custom(
        "rope_inverse", CHIPS, "inverse_partial_rotary_mul", "inplace_partial_rotary_mul",
        "fp32 tables; -sin",
    ),
    Row(
        "rope", CHIPS, "npu_rotary_mul", "npu::npu_rotary_mul", "fp32 tables",
        "OPD npu_rotary_mul", _ALL,
    ),
    Row(
        "rope_inverse", CHIPS, "inverse_npu_rotary_mul", "npu::npu_rotary_mul",
        "fp32 tables; -sin", "OPD npu_rotary_mul", _ALL,
    ),
    Row(
        "rms_norm", CHIPS, "npu_rms_norm", "npu::npu_rms_norm", "fp32 weight",
        "OPD npu_rms_norm", _ALL,
    ),
    _custom(
        "rms_norm_int8", (A2, A3), "rms_norm_dynamic_quant", "npu_rms_norm_dynamic_quant",
        "bf16, a weight that bf16 holds",
    ),
    Row(
        "rms_norm_int8", CHIPS, "npu_rms_norm_int8", "npu::npu_rms_norm", "fp32 weight",
        "OPD npu_rms_norm", _ALL,
    ),
    Row(
        "head_rms_norm", CHIPS, "npu_head_rms_norm", "npu::npu_rms_norm", "a norm without weight",
        "OPD npu_rms_norm", _ALL,
    ),
    _custom(
        "swiglu_act_quant", (A5,), "swiglu_group_quant", "npu_swiglu_group_quant",
        "bf16, halves of 128 n, a limit above 0",
    ),
    Row(
        "fp8_gemm", (A5,), "quant_matmul_mx", "npu::npu_quant_matmul",
        "bf16 out, power-of-two scales, weight dims below 65536", "OPD npu_quant_matmul", _NEW,
        before=TILES,
    ),
    Row(
        "fp4_gemm", (A5,), "one_group_matmul_fp4", "npu::npu_grouped_matmul", "bf16 out",
        "VA device/device_op.py, A5DeviceAdaptor", _NEW,
    ),
    Row(
        "grouped_gemm", (A5,), "grouped_matmul_mx", "npu::npu_grouped_matmul",
        "fp8 or fp4 weights, power-of-two scales, bf16 out",
        "VA device/device_op.py, A5DeviceAdaptor", _NEW,
    ),
    Row(
        "grouped_gemm", CHIPS, "grouped_matmul_bf16", "npu::npu_grouped_matmul", "bf16 throughout",
        "OPD npu_grouped_matmul", _ALL,
    ),
    Row(
        "store_rows", CHIPS, "stock_scatter_nd_update", "npu::npu_scatter_nd_update_",
        "A2 and A3: records without fp8 and fp4", "OPD npu_scatter_nd_update_", _ALL,
    ),
    Row(
        "heads_gemm", CHIPS, "transpose_batchmatmul", "npu::npu_transpose_batchmatmul",
        "bf16; A2 and A3: sides of 16 n below 65536", "OPD npu_transpose_batchmatmul", _ALL,
    ),
    Row(
        "int8_act_quant", CHIPS, "dynamic_quant", "npu::npu_dynamic_quant", "bf16",
        "OPD npu_dynamic_quant", _ALL,
    ),
    Row(
        "int8_gemm", CHIPS, "quant_matmul_int8", "npu::npu_quant_matmul",
        "bf16 out, weight dims below 65536", "OPD npu_quant_matmul", _ALL, before=TILES,
    ),
    Row(
        "grouped_int8_gemm", CHIPS, "grouped_matmul_int8", "npu::npu_grouped_matmul",
        "int8 weights, bf16 out", "OPD npu_grouped_matmul", _ALL, before=TILES,
    ),
    Row(
        "grouped_int8_gemm", (A2, A3), "grouped_matmul_int4", "npu::npu_grouped_matmul",
        "int4 weights, 8 n output channels, bf16 out", "OPD npu_grouped_matmul; VA methods/w4a8.py",
        _OLD,
    ),
    _custom(
        "grouped_int8_gemm_swiglu", (A2, A3), "grouped_matmul_swiglu_quant",
        "grouped_matmul_swiglu_quant", "int8 weights of at most 10240 x 65535, a limit above 0",
    ),
    _custom(
        "grouped_int8_gemm_swiglu", (A2, A3), "grouped_matmul_swiglu_quant_v2",
        "grouped_matmul_swiglu_quant_v2", "int4 weights, 8 n output channels, a limit above 0",
    ),
    Row(
        "grouped_int8_gemm_swiglu", CHIPS, "grouped_matmul_to_int32", "npu::npu_grouped_matmul",
        "int8 weights of at most 10240 x 65535, a limit above 0", "OPD npu_grouped_matmul", _ALL,
    ),
    Row(
        "grouped_int8_gemm_swiglu", (A2, A3), "grouped_matmul_int4_to_bf16",
        "npu::npu_grouped_matmul", "int4 weights, 8 n output channels, a limit above 0",
        "OPD npu_grouped_matmul; VA methods/w4a8.py", _OLD,
    ),
    _custom(
        "expert_layer", (A3,), "dispatch_ffn_combine", "dispatch_ffn_combine",
        "int8 weights, 2 to 32 ranks of an HCCL group, bf16, and so the sums, a limit above 0",
    ),
    Row(
        "moe_permute", CHIPS, "init_routing", "npu::npu_moe_init_routing_v2", "none",
        "OPD npu_moe_init_routing_v2", _ALL,
    ),
    Row(
        "moe_dispatch", CHIPS, "distribute_dispatch", "npu::npu_moe_distribute_dispatch_v2",
        "many ranks of an HCCL group; bf16; 512 tokens a rank (A2: 256), top 16 of 1024, dim 1024 "
        "to 8192 (A2: 32 n up to 7168)", "OPD npu_moe_distribute_dispatch_v2", _ALL,
    ),
    Row(
        "moe_dispatch", CHIPS, "gather_and_route", "npu::npu_moe_init_routing_v2",
        "3 ranks; tokens are gathered through the group", "OPD npu_moe_init_routing_v2", _ALL,
    ),
    Row(
        "moe_unpermute", CHIPS, "token_unpermute", "npu::npu_moe_token_unpermute", "top 512",
        "OPD npu_moe_token_unpermute", _ALL,
    ),
    Row(
        "moe_combine", CHIPS, "distribute_combine", "npu::npu_moe_distribute_combine_v2",
        "rows that distribute_dispatch brought; bf16, and so the sums",
        "OPD npu_moe_distribute_combine_v2", _ALL,
    ),
    Row(
        "moe_combine", CHIPS, "local_unpermute", "npu::npu_moe_token_unpermute",
        "one rank, top 512", "OPD npu_moe_token_unpermute", _ALL,
    ),
)  # fmt: skip

TRITON = tuple(
    Row(
        op,
        (A2, A3),
        f"triton_{op}",
        f"triton::{op}",
        limits,
        "backends/triton, lowered",
        ">= 8.5.1",
    )
    for op, limits in (
        ("hadamard", "bf16 or fp32, a power of two channels"),
        ("swiglu", "bf16 or fp32"),
        ("hc_head", "bf16 or fp32"),
        ("index_scores", "records bf16 and fp32"),
        ("index_topk", "none"),
    )
)
TABLE += TRITON

# Operators of V3.2 whose causal limit does not know cmp_ratio: on compressed rows a token
# would see rows of the future. Nothing here may call them.
NEVER = (
    "npu_lightning_indexer",
    "npu_quant_lightning_indexer",
    "npu_sparse_flash_attention",
    "npu_kv_quant_sparse_flash_attention",
)

_current = [A5]


def chip_named(name: str) -> str:
    """Return the chip of any of its names.

    Raises:
        ConfigError: it is none we know operators of.
    """
    short = re.sub(r"^(atlas[- ]?)?(ascend[-_ ]?)?", "", name.strip().lower())
    for chip, pattern in NAMES:
        if re.fullmatch(pattern, short):
            return chip
    raise ConfigError("--soc", f"no chip {name!r}; there is {', '.join(CHIPS)} (950dt, 910b, 910c)")


def chip_here() -> str | None:
    """Return the chip of this machine's, or this process's emulated, NPUs; None without any."""
    if custom_ops.why_no_npu() is not None:
        return None
    version = custom_ops.torch_npu().npu.get_soc_version()
    for chip, versions in SOC_VERSIONS.items():
        if version in versions:
            return chip
    raise ConfigError("npu", f"SoC version {version} has no V4 operators; {', '.join(CHIPS)} have")


def current_chip() -> str:
    """Return the chip whose kernels are tried."""
    return _current[0]


def kernels_of(op: Op[..., Any], chip: str) -> list[Kernel[..., Any]]:
    """Return an op's kernels for a chip, in the order in which they are tried."""
    on_chip = {r.kernel for r in TABLE if r.op == op.name and chip in r.chips}
    kernels = op.kernels.get("ascend", ())
    there = [k for k in kernels if k.provider == "torch" or k.name in on_chip]
    return sorted(there, key=lambda k: PROVIDERS.index(k.provider))


def plain_only(chip: str) -> list[str]:
    """Return the ops that have nothing but plain torch on a chip."""
    name, others = chip_named(chip), (*absent(chip), *WHOLE)
    return [
        op.name
        for op in OPS.values()
        if op.name not in others and {k.provider for k in kernels_of(op, name)} == {"torch"}
    ]


def absent(chip: str) -> tuple[str, ...]:
    """Return the ops that a chip cannot run at all, for want of the number formats."""
    return () if chip_named(chip) in NARROW_CHIPS else NARROW_OPS


def use_chip(name: str | None) -> None:
    """Try the kernels of a chip from now on; None is the chip that is here, else the 950.

    Where there are NPUs, kernels whose vendor operator is not installed are left out, aloud;
    where there are none, the order is that of a machine that has everything.
    """
    here = chip_here()
    chip = chip_named(name) if name is not None else here or A5
    order(chip, only_installed=here == chip)


def order(chip: str, *, only_installed: bool) -> None:
    """Set the order of every op's kernels."""
    _current[0] = chip
    vendor = {r.kernel: r.vendor for r in TABLE}
    for op in OPS.values():
        kernels = kernels_of(op, chip)
        if only_installed:
            kernels = [k for k in kernels if _is_installed(vendor.get(k.name))]
        op.try_in_order("ascend", kernels)


def _is_installed(vendor: str | None) -> bool:
    namespace, _, name = (vendor or "").partition("::")
    why = None
    if namespace == "triton":
        why = custom_ops.why_no_triton()
    elif namespace == "_C_ascend" and not custom_ops.has_c_ascend(name):
        why = custom_ops.why_no_c_ascend() or f"this build of vllm-ascend has no {name}"
    if why is not None:
        _warn_missing(namespace, why)
    return why is None


@cache
def _warn_missing(namespace: str, why: str) -> None:
    log.warning("kernels through %s are left out: %s", namespace, why)
