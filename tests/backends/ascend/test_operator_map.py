"""Every vendor operator that serves V4: a kernel calls it, or a test shows it not to fit."""

import re
from pathlib import Path

import pytest

from v4_ascend.backends.ascend import soc
from v4_ascend.emulation.stand_in import STAND_INS
from v4_ascend.emulation.vendor import __all__ as _loaded  # declares the stand-ins

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/ascend.md").read_text()
UNFIT_TESTS = (ROOT / "tests/emulation/test_unfit_operators.py").read_text()
UNFIT = re.compile(r"^\| `(\w+::\w+)` \| ([A0-9, ]+) \| ([^|]+) \| `(\w+)` \|$", re.M)
A2, A3, A5 = soc.CHIPS
OLD, ALL = (A2, A3), soc.CHIPS

# What the vendor has for each operator of V4, and on which chips. Sources: vllm-ascend
# csrc/torch_binding.cpp and csrc/build_aclnn.sh; op-plugin docs of each npu_*.
MAP = {
    "compressor": {"_C_ascend::compressor": ALL, "_C_ascend::compressor_metadata": ALL},
    "write a cache": {
        "_C_ascend::npu_scatter_nd_update_v2": OLD, "_C_ascend::kv_compress_epilog": (A5,),
        "_C_ascend::indexer_compress_epilog_v2": (A5,), "npu::npu_scatter_nd_update_": ALL,
    },
    "indexer": {
        "_C_ascend::npu_vllm_quant_lightning_indexer": ALL,
        "_C_ascend::npu_vllm_quant_lightning_indexer_metadata": ALL,
    },
    "attention": {
        "_C_ascend::npu_sparse_attn_sharedkv": OLD,
        "_C_ascend::npu_sparse_attn_sharedkv_metadata": OLD,
        "_C_ascend::npu_kv_quant_sparse_attn_sharedkv": (A5,),
        "_C_ascend::npu_kv_quant_sparse_attn_sharedkv_metadata": (A5,),
    },
    "hyper-connections": {
        "_C_ascend::npu_hc_pre_v2": ALL, "_C_ascend::npu_hc_post": ALL,
        "npu::npu_mhc_pre": (A5,), "npu::npu_mhc_sinkhorn": (A5,), "npu::npu_mhc_post": (A5,),
    },
    "gate": {"_C_ascend::moe_gating_top_k_hash": ALL, "npu::npu_moe_gating_top_k": ALL},
    "experts between ranks": {
        "npu::npu_moe_distribute_dispatch_v2": ALL, "npu::npu_moe_distribute_combine_v2": ALL,
    },
    "routing": {"npu::npu_moe_init_routing_v2": ALL, "npu::npu_moe_token_unpermute": ALL},
    "products": {"npu::npu_grouped_matmul": ALL, "npu::npu_quant_matmul": ALL},
    "product and activation": {
        "_C_ascend::grouped_matmul_swiglu_quant": OLD,
        "_C_ascend::grouped_matmul_swiglu_quant_v2": OLD,
        "npu::npu_grouped_matmul_swiglu_quant_v2": ALL,
        "_C_ascend::npu_swiglu_group_quant": (A5,),
    },
    "a whole expert layer": {"_C_ascend::dispatch_ffn_combine": (A3,)},
    "rope": {
        "_C_ascend::inplace_partial_rotary_mul": ALL, "npu::npu_rotary_mul": ALL,
        "npu::npu_interleave_rope": ALL,
    },
    "norm": {
        "npu::npu_rms_norm": ALL, "_C_ascend::npu_rms_norm_dynamic_quant": OLD,
        "npu::npu_add_rms_norm_dynamic_mx_quant": (A5,),
    },
    "quantiser": {"npu::npu_dynamic_quant": ALL, "npu::npu_dynamic_mx_quant": (A5,)},
    "o_proj": {
        "npu::npu_transpose_batchmatmul": ALL, "npu::npu_transpose_quant_batchmatmul": (A5,),
    },
    "layouts": {"npu::npu_format_cast": ALL},
}  # fmt: skip
OPERATORS = {name: chips for row in MAP.values() for name, chips in row.items()}


def _chips(said):
    return tuple("950" if c == "950" else c.lower() for c in said.split(", "))


def _on(chip, rows):
    """The operators that rows of a table name for a chip."""
    return [name for name, chips in rows if chip in _chips(chips)]


def _called(chip):
    rows = [r for r in soc.TABLE if chip in r.chips and not r.vendor.startswith("triton::")]
    return {name for row in rows for name in (row.vendor, *row.beside, *row.before)}


@pytest.mark.parametrize("chip", soc.CHIPS)
def test_an_operator_of_the_map_is_called_or_shown_not_to_fit(chip):
    there = {name for name, chips in OPERATORS.items() if chip in chips}
    unfit = _on(chip, [row[:2] for row in UNFIT.findall(PAGE)])
    assert sorted([*_called(chip), *unfit]) == sorted(there), "each in one place"


def test_a_test_shows_each_unfit_operator_to_be_unfit():
    rows = UNFIT.findall(PAGE)
    assert rows
    for name, _, _, test in rows:
        found = re.search(rf"^def {test}\(.*?(?=^def |^@|\Z)", UNFIT_TESTS, re.M | re.S)
        assert found, test
        assert name.partition("::")[2] in found[0]


def test_every_operator_of_the_map_has_a_stand_in_on_its_chips():
    assert _loaded
    assert {name: s.generations for name, s in STAND_INS.items()} == OPERATORS
