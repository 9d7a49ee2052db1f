"""What the vendor's kernels refuse, the stand-ins refuse: by argument, value and limit."""

import pytest
import torch

from v4_ascend.emulation.chips import CHIPS
from v4_ascend.emulation.vendor import (
    attention,
    cache,
    compressor,
    gate,
    gemm,
    hyper_connection,
    indexer,
    metadata,
    norm,
)

BF16, I32, E4M3 = torch.bfloat16, torch.int32, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def chip(monkeypatch):
    def use(name):
        monkeypatch.setattr("v4_ascend.emulation.stand_in._running_on", [CHIPS[name]])

    use("a3")
    return use


def ints(*values):
    return torch.tensor(values, dtype=I32)


def attention_call(heads=64, **changes):
    plan = {"cmp_ratio": 1, "has_cmp_kv": False, "layout_q": "TND", "seqused_kv": ints(9)}
    made = metadata.npu_sparse_attn_sharedkv_metadata(heads, 1, 512, ints(0, 2), **plan)
    call = {
        "q": torch.zeros(2, heads, 512, dtype=BF16),
        "ori_kv": torch.zeros(1, 32, 1, 512, dtype=BF16),
        "ori_block_table": ints(0).view(1, 1), "cu_seqlens_q": ints(0, 2), "seqused_kv": ints(9),
        "sinks": torch.zeros(heads), "metadata": made, "softmax_scale": 0.04, "cmp_ratio": 1,
        "ori_win_left": 127, "layout_q": "TND",
    }  # fmt: skip
    return attention.npu_sparse_attn_sharedkv(**(call | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": torch.zeros(2, 64, 576, dtype=BF16)}, r"q.shape is \[2, 64, 576\]"),
        ({"q": torch.zeros(2, 64, 512)}, "q.dtype is torch.float32; it must be bfloat16, float16"),
        ({"ori_kv": torch.zeros(1, 8, 1, 512, dtype=BF16)}, "block_size is 8; .*multiple of 16"),
        ({"ori_kv": torch.zeros(1, 32, 512, dtype=BF16)}, "ori_kv.shape"),
        ({"sinks": torch.zeros(63)}, "sinks.shape"),
        ({"metadata": None}, "metadata is None"),
        ({"metadata": torch.zeros(1024, dtype=I32)}, "must come from the metadata operator"),
        ({"cmp_ratio": 4}, "cmp_ratio is 4; it must be 1"),
        ({"layout_q": "BSND"}, "layout_q"),
        ({"ori_mask_mode": 3}, "ori_mask_mode is 3; it must be 4"),
        ({"cu_seqlens_q": ints(0, 1)}, "rise from 0 to 2"),
        (
            {"seqused_kv": ints(33)},
            "request 0 has 33 rows, 2 blocks",
        ),
        ({"softmax_scale": 0.0}, "softmax_scale"),
        ({"ori_block_table": torch.zeros(1, 1, dtype=torch.int64)}, "ori_block_table.dtype"),
    ],
)
def test_attention(changes, said):
    attention_call()
    attention_call(heads=16)  # a tensor-parallel rank
    with pytest.raises(RuntimeError, match=said):
        attention_call(**changes)


def test_attention_with_another_layer_kinds_table():
    made = metadata.npu_sparse_attn_sharedkv_metadata(
        64, 1, 512, ints(0, 2), seqused_kv=ints(9), cmp_ratio=128, layout_q="TND"
    )
    with pytest.raises(RuntimeError, match="metadata's cmp_ratio is 128; this call has 0"):
        attention_call(metadata=made)


def test_950_wants_all_query_heads():
    with pytest.raises(RuntimeError, match="num_heads_q is 32; it must be 64, 128"):
        metadata.npu_kv_quant_sparse_attn_sharedkv_metadata(32, 1, 512, 1, ints(0, 2))


def compressor_call(**changes):
    n, start = changes.pop("n", 8), changes.pop("start", 0)
    call = {
        "x": torch.zeros(n, 1024, dtype=BF16), "wkv": torch.zeros(1024, 1024, dtype=BF16),
        "wgate": torch.zeros(1024, 1024, dtype=BF16), "state_cache": torch.zeros(9, 4, 2048),
        "ape": torch.zeros(4, 1024), "norm_weight": torch.ones(512, dtype=BF16),
        "rope_sin": torch.zeros(n // 4 + 1, 64, dtype=BF16),
        "rope_cos": torch.ones(n // 4 + 1, 64, dtype=BF16),
        "state_block_table": torch.arange(1, 9, dtype=I32).view(1, -1), "cu_seqlens": ints(0, n),
        "seqused": None, "start_pos": ints(start), "rope_head_dim": 64, "cmp_ratio": 4, "coff": 2,
        "norm_eps": 1e-6, "rotary_mode": 2, "cache_mode": 1,
    }  # fmt: skip
    return compressor.compressor(**(call | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": torch.zeros(8, 1000, dtype=BF16)}, "x's H is 1000; .*multiple of 512"),
        ({"cmp_ratio": 128}, r"\(D, coff, cmp_ratio\) is \(512, 2, 128\)"),
        ({"wkv": torch.zeros(1024, 1024)}, "wkv.dtype is torch.float32; it must be bfloat16"),
        ({"norm_weight": torch.ones(512)}, "norm_weight.dtype"),
        ({"rope_cos": torch.ones(2, 64, dtype=BF16)}, "rope_cos.shape"),
        ({"state_cache": torch.zeros(9, 4, 1024)}, "state_cache.shape"),
        ({"rotary_mode": 1}, "rotary_mode is 1; it must be 2"),
        ({"state_block_table": ints(1).view(1, 1)}, "state_block_table.shape.1. is 1"),
        ({"state_block_table": ints(1, 1).view(1, 2)}, "rows written twice by a call is 4"),
        (
            {"start": 6, "state_block_table": torch.zeros(1, 8, dtype=I32)},
            "block 0 is never written, and these positions are read",
        ),
    ],
)
def test_compressor(changes, said):
    compressor_call()
    with pytest.raises(RuntimeError, match=said):
        compressor_call(**changes)


def test_950_wants_the_norm_in_fp32(chip):
    chip("950dt")
    with pytest.raises(RuntimeError, match="norm_weight.dtype .* must be float32"):
        compressor_call()
    compressor_call(norm_weight=torch.ones(512))


def test_indexer(chip):
    made = metadata.npu_vllm_quant_lightning_indexer_metadata(
        64, 1, 128, 0, 0, ints(2), ints(9), layout_key="PA_BSND", sparse_count=512, cmp_ratio=4
    )
    call = {
        "query": torch.zeros(2, 64, 128, dtype=torch.int8),
        "key": torch.zeros(1, 16, 1, 128, dtype=torch.int8),
        "weights": torch.ones(2, 64).half(), "query_dequant_scale": torch.ones(2, 64).half(),
        "key_dequant_scale": torch.ones(1, 16, 1).half(), "actual_seq_lengths_query": ints(2),
        "actual_seq_lengths_key": ints(9), "block_table": ints(0).view(1, 1), "metadata": made,
        "layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": 512, "cmp_ratio": 4,
    }  # fmt: skip
    run = indexer.npu_vllm_quant_lightning_indexer
    run(**call)
    for changes, said in (
        ({"weights": torch.ones(2, 64)}, "weights.dtype is torch.float32; it must be float16"),
        ({"return_value": True}, "return_value"),
        ({"query": torch.zeros(2, 32, 128, dtype=torch.int8)}, "query.shape"),
        ({"actual_seq_lengths_query": ints(0, 2)}, "actual_seq_lengths_query.shape"),
        ({"weights": torch.full((2, 64), 6e4).half(),
          "query_dequant_scale": torch.full((2, 64), 2.0).half()}, "at most 65504"),
        ({"sparse_count": 1024}, "metadata's topk is 512; this call has 1024"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=said):
            run(**(call | changes))
    chip("950dt")
    with pytest.raises(RuntimeError, match="query.dtype is torch.int8; it must be float8_e4m3fn"):
        run(**call)


def test_the_rest(chip):
    x = torch.zeros(2, 4, 2048, dtype=BF16)
    cases = [
        ("x's D is 2048", lambda: hyper_connection.npu_hc_pre_v2(
            x, torch.zeros(24, 8192), torch.ones(3), torch.zeros(24), 4, 20, 1e-6, 1e-6)),
        ("x.shape", lambda: hyper_connection.npu_hc_post(
            x[:, 0], x, torch.zeros(2, 4), torch.zeros(2, 4, 4))),
        ("renorm is 1", lambda: gate.moe_gating_top_k_hash(torch.zeros(2, 8), 2, renorm=1)),
        ("norm_type is 2; it must be 0, 1", lambda: gate.npu_moe_gating_top_k(
            torch.zeros(2, 8), 2, norm_type=2)),
        ("fp8 is 950 only", lambda: norm.npu_dynamic_quant(x, dst_type=292)),
        ("must be 950", lambda: gemm.npu_quant_matmul(
            torch.zeros(2, 64).to(E4M3), torch.zeros(64, 32).to(E4M3), torch.ones(1, 1),
            pertoken_scale=torch.ones(2, 1), output_dtype=15, group_sizes=[1, 128, 128])),
        ("below 65536; split it", lambda: gemm.npu_quant_matmul(
            torch.zeros(1, 8, dtype=torch.int8), torch.zeros(8, 65536, dtype=torch.int8),
            torch.ones(65536), pertoken_scale=torch.ones(1), output_dtype=15)),
        ("weight's K is 32; x has 64", lambda: gemm.npu_grouped_matmul(
            [torch.zeros(4, 64, dtype=BF16)], [torch.zeros(2, 32, 8, dtype=BF16)],
            group_list=torch.tensor([2, 2]), split_item=2, group_type=0, group_list_type=1)),
        ("group_list's total is 5", lambda: gemm.npu_grouped_matmul(
            [torch.zeros(4, 64, dtype=BF16)], [torch.zeros(2, 64, 8, dtype=BF16)],
            group_list=torch.tensor([2, 3]), split_item=2, group_type=0, group_list_type=1)),
        ("partial_slice", lambda: cache.inplace_partial_rotary_mul(
            torch.zeros(2, 1, 4, 128), torch.ones(2, 1, 1, 64), torch.ones(2, 1, 1, 64),
            "interleave", [448, 512])),
        ("slot_mapping is past the end", lambda: cache.kv_compress_epilog(
            torch.zeros(4, 1, 640).to(E4M3), torch.zeros(1, 512, dtype=BF16), ints(4), 64, 2,
            True, 1)),
    ]  # fmt: skip
    for said, call in cases:
        with pytest.raises(RuntimeError, match=said):
            call()
