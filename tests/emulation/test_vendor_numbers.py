"""The vendor's stand-ins against the operators' references: two texts, one set of numbers."""

import pytest
import torch

from v4_ascend.emulation.chips import CHIPS
from v4_ascend.emulation.stand_in import _running_on
from v4_ascend.emulation.vendor import (
    attention,
    cache,
    compressor,
    expert_gemm,
    gate,
    gemm,
    hyper_connection,
    indexer,
    metadata,
    norm,
    routing,
)
from v4_ascend.ops.compress_kv import compress_kv
from v4_ascend.ops.gate import hash_gate, topk_gate
from v4_ascend.ops.hyper_connection import hc_post, hc_pre
from v4_ascend.ops.indexer import index_select
from v4_ascend.ops.records import RECORDS, load_slots, store_rows
from v4_ascend.ops.sparse_attn import sparse_attn
from v4_ascend.ops.swiglu import swiglu

BF16 = torch.bfloat16
LENGTHS = ((0, 5), (600, 2), (3, 1))  # tokens before, tokens now


@pytest.fixture(params=["a3", "950dt"])
def chip(request, monkeypatch):
    monkeypatch.setattr("v4_ascend.emulation.stand_in._running_on", [CHIPS[request.param]])
    return CHIPS[request.param].generation


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def ragged():
    seq_lens = torch.tensor([p + n for p, n in LENGTHS], dtype=torch.int32)
    new = torch.tensor([n for _, n in LENGTHS], dtype=torch.int32)
    return seq_lens, torch.nn.functional.pad(new.cumsum(0), (1, 0)).int()


def paged(g, n_rows, record, width, block_rows=32):
    blocks = n_rows // block_rows + 1
    table = torch.randperm(len(LENGTHS) * blocks, generator=g).view(len(LENGTHS), blocks).int()
    storage = RECORDS[record].new_storage(table.numel(), block_rows, width)
    rows = torch.randn(table.numel() * block_rows, width, generator=g)
    store_rows.reference(storage, rows, torch.arange(len(rows)), record)
    return storage, table


@pytest.mark.parametrize("kind", ["swa", "csa", "hca"])
@pytest.mark.parametrize("quant", [False, True])
def test_attention(g, kind, quant):
    seq_lens, cu = ragged()
    ratio, heads = {"swa": 0, "csa": 4, "hca": 128}[kind], 64
    record = "fp8_640" if quant else "bf16"
    window, window_table = paged(g, 602, record, 512)
    compressed = table = indices = sparse = None
    if ratio:
        compressed, table = paged(g, 602 // ratio, record, 512)
    if kind == "csa":
        position = torch.cat([torch.arange(p, p + n) for p, n in LENGTHS])
        indices = torch.rand(8, 150, generator=g).argsort(-1)[:, :20].int()
        indices = indices.masked_fill(indices >= (position[:, None] + 1) // 4, -1)
        sparse = torch.full((8, 1, 512), -1, dtype=torch.int32)
        for t in range(8):
            seen = indices[t][indices[t] >= 0]
            sparse[t, 0, : len(seen)] = seen
    q = torch.randn(8, heads, 512, generator=g).to(BF16)
    sinks = torch.randn(heads, generator=g)
    want = sparse_attn.reference(
        q, window, window_table, compressed, table, indices, record, seq_lens, cu, sinks,
        512**-0.5, 128, ratio,
    )  # fmt: skip

    def rows(t):
        if t is None:
            return None
        return t.view(torch.float8_e4m3fn).unsqueeze(2) if quant else t.unsqueeze(2)

    shared = {"cu_seqlens_q": cu, "seqused_kv": seq_lens, "cmp_ratio": max(ratio, 1)}
    layout = {"layout_q": "TND", "layout_kv": "PA_ND", "ori_win_left": 127}
    scheduled = {"cmp_topk": 512 if kind == "csa" else 0, "has_cmp_kv": bool(ratio)}
    call = {
        "ori_kv": rows(window), "ori_block_table": window_table, "cmp_kv": rows(compressed),
        "cmp_block_table": table, "cmp_sparse_indices": sparse, "sinks": sinks,
        "softmax_scale": 512**-0.5, **shared, **layout,
    }  # fmt: skip
    if quant:
        plan = metadata.npu_kv_quant_sparse_attn_sharedkv_metadata(
            heads, 1, 512, 1, **shared, **layout, **scheduled
        )
        got, _ = attention.npu_kv_quant_sparse_attn_sharedkv(
            q, 1, tile_size=64, rope_head_dim=64, metadata=plan, **call
        )
    else:
        plan = metadata.npu_sparse_attn_sharedkv_metadata(
            heads, 1, 512, **shared, **layout, **scheduled
        )
        got, _ = attention.npu_sparse_attn_sharedkv(q, metadata=plan, **call)
    # The reference rounds probabilities to bf16 before they multiply the rows.
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=2**-8)


@pytest.mark.parametrize(("dim", "coff", "ratio"), compressor.KINDS)
def test_compressor_in_any_chunks(g, chip, dim, coff, ratio):
    hidden, total, width = 1024, 261, coff * dim
    x = torch.randn(total, hidden, generator=g).to(BF16)
    wkv, wgate = (torch.randn(width, hidden, generator=g).mul(0.03).to(BF16) for _ in range(2))
    ape = torch.randn(ratio, width, generator=g)
    weight = torch.rand(dim, generator=g).to(BF16)
    angle = torch.rand(total, 32, generator=g)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    wide_cos, wide_sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)

    n_groups = total // ratio
    want, _ = compress_kv.reference(
        x, wkv.float(), wgate.float(), ape, weight.float(),
        cos[::ratio][: n_groups + 1].float(), sin[::ratio][: n_groups + 1].float(),
        torch.zeros(1, coff * ratio, 2 * width), torch.tensor([0]),
        torch.tensor([total], dtype=torch.int32), torch.tensor([0, total], dtype=torch.int32),
        ratio, 1e-6,
    )  # fmt: skip
    table = torch.arange(1, 67, dtype=torch.int32).view(1, -1)
    state = torch.full((67, 4, 2 * width), float("nan"))
    slots = torch.arange(4, dtype=torch.int32).view(1, -1)
    gained = []
    for first, last in ((0, 3), (3, 4), (4, 130), (130, 131), (131, 259), (259, total)):
        cu = torch.tensor([0, last - first], dtype=torch.int32)
        start = torch.tensor([first], dtype=torch.int32)
        n = min(last - first, (last - first) // ratio + 1)
        row_cos, row_sin, slot = compressor.compressor_metadata(
            wide_cos, wide_sin, cu, start, slots, 32, 1, ratio, n, 1
        )
        rows = compressor.compressor(
            x[first:last], wkv, wgate, state, ape, weight.float() if chip == "950" else weight,
            row_sin[:, 0, 0], row_cos[:, 0, 0], table, cu, None, start, 64, ratio, coff, 1e-6, 2, 1,
        )  # fmt: skip
        made = last // ratio - first // ratio
        assert slot.tolist() == [*range(first // ratio, last // ratio), *[-1] * (n - made)]
        assert bool(rows[made:].isnan().all())
        gained.append(rows[:made])
    torch.testing.assert_close(
        torch.cat(gained).float(), want[:n_groups].float(), rtol=2**-6, atol=2**-6
    )


def test_indexer(g, chip):
    seq_lens, cu = ragged()
    on_950 = chip == "950"
    values, scales = (torch.float8_e4m3fn, torch.float32) if on_950 else (torch.int8, torch.float16)
    # Small integers and powers of two: every sum is exact, so ties are real ties.
    table = torch.randperm(15, generator=g).view(3, 5).int()
    key = torch.randint(-2, 3, (15, 32, 1, 128), generator=g).to(values)
    query = torch.randint(-2, 3, (8, 64, 128), generator=g).to(values)
    weights = (torch.randint(-2, 5, (8, 64), generator=g) / 4).to(scales)
    q_scale = torch.full((8, 64), 0.5, dtype=scales)
    k_scale = torch.exp2(torch.randint(-2, 2, (15, 32, 1), generator=g)).to(scales)
    storage = (key.float().squeeze(2) * k_scale.float()).contiguous()
    want = index_select.reference(
        query.float() * 0.5, weights.float(), storage, "fp32", table, seq_lens, cu, 4, 8
    )
    plan = metadata.npu_vllm_quant_lightning_indexer_metadata(
        64, 1, 128, 0, 0, cu[1:], seq_lens, layout_key="PA_BSND", sparse_count=8, cmp_ratio=4
    )
    got, _ = indexer.npu_vllm_quant_lightning_indexer(
        query, key, weights, q_scale, k_scale, 0, 0, cu[1:], seq_lens, table, plan, "TND",
        "PA_BSND", 8, cmp_ratio=4,
    )  # fmt: skip
    assert torch.equal(got[:, 0].sort(-1).values, want.sort(-1).values)


def test_hyper_connections(g):
    x = torch.randn(3, 4, 4096, generator=g).to(BF16)
    fn = torch.randn(24, 4 * 4096, generator=g) * 0.01
    scale, base = torch.rand(3, generator=g), torch.randn(24, generator=g)
    y, post, comb = hyper_connection.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-6)
    want = hc_pre.reference(x, fn, scale, base, 1e-6, 1e-6, 20)
    for a, b in zip((y, post, comb), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == BF16 else 1e-4, atol=1e-4)
    out = torch.randn(3, 4096, generator=g).to(BF16)
    got = hyper_connection.npu_hc_post(out[None], x[None], post[None], comb[None])[0]
    torch.testing.assert_close(got, hc_post.reference(out, x, post, comb))
    # torch_npu's three operators say the same in other words.
    h_in, h_post, h_res, _, _, _ = hyper_connection.npu_mhc_pre(x, fn, scale, base)
    h_res, _, _ = hyper_connection.npu_mhc_sinkhorn(h_res)
    torch.testing.assert_close((h_in, h_post, h_res), (y, post, comb))
    torch.testing.assert_close(hyper_connection.npu_mhc_post(x, h_res, out, h_post), got)


def test_gates(g):
    logits = torch.randn(9, 256, generator=g) * 3
    bias = torch.randn(256, generator=g)
    weights, experts, _ = gate.moe_gating_top_k_hash(
        logits, 6, bias, routed_scaling_factor=1.5, norm_type=2, group_select_mode=1
    )
    want = topk_gate.reference(logits, bias, 6, 1.5)
    torch.testing.assert_close((weights, experts.long()), want)
    table = torch.rand(97, 256, generator=g).argsort(-1)[:, :6].contiguous()
    ids = torch.randint(0, 97, (9,), generator=g)
    weights, experts, _ = gate.moe_gating_top_k_hash(
        logits, 6, None, ids, table.int(), routed_scaling_factor=1.5, norm_type=2
    )
    torch.testing.assert_close(
        (weights, experts.long()), hash_gate.reference(logits, table, ids, 1.5)
    )


def test_cache_writes_are_records(g):
    rows = torch.randn(4, 512, generator=g).to(BF16)
    slots = torch.tensor([40, -1, 3, 63], dtype=torch.int32)
    storage = torch.zeros(2, 32, 640, dtype=torch.uint8)
    cache.kv_compress_epilog(
        storage.view(torch.float8_e4m3fn).view(-1, 1, 640), rows, slots, 64, 2, True, 1
    )
    want = torch.zeros_like(storage)
    kept = slots >= 0
    store_rows.reference(want, rows[kept], slots[kept].long(), "fp8_640")
    assert torch.equal(storage, want)

    keys = torch.randn(4, 128, generator=g).to(BF16)
    storage = torch.zeros(2, 32, 132, dtype=torch.uint8)
    cache.indexer_compress_epilog_v2(storage.unsqueeze(2), keys, slots)
    want = torch.zeros_like(storage)
    store_rows.reference(want, keys[kept], slots[kept].long(), "fp8_132")
    assert torch.equal(storage, want)
    read = load_slots(storage, "fp8_132", slots[kept].long())
    torch.testing.assert_close(read, keys[kept].float(), rtol=0.07, atol=0.01)


def test_scatter_by_block_and_offset(g):
    var, update = torch.zeros(3, 4, 1, 8), torch.randn(3, 1, 8, generator=g)
    indices = torch.tensor([[2, 1], [-1, 3], [0, 3]], dtype=torch.int32)
    cache.npu_scatter_nd_update_v2(var, indices, update)
    want = torch.zeros_like(var)
    want[2, 1], want[0, 3] = update[0], update[2]
    assert torch.equal(var, want)


def test_experts_in_int8(g):
    x = torch.randn(11, 256, generator=g).to(BF16)
    weight = torch.randn(3, 256, 128, generator=g).to(BF16)
    counts = torch.tensor([4, 0, 6])
    plain = gemm.npu_grouped_matmul(
        [x], [weight], group_list=counts, split_item=2, group_type=0, group_list_type=1
    )[0]
    expert = torch.tensor([0] * 4 + [2] * 6)
    want = torch.einsum("mk,mkn->mn", x[:10].float(), weight[expert].float())
    torch.testing.assert_close(plain[:10].float(), want, rtol=2**-7, atol=1e-3)
    assert bool(plain[10].isnan().all())  # a row of no expert

    q, q_scale = norm.formats.per_token(x, torch.int8)
    w, w_scale = norm.formats.per_token(weight.transpose(1, 2), torch.int8)
    w, cumulative = w.transpose(1, 2).contiguous(), counts.cumsum(0)
    product = gemm.npu_grouped_matmul(
        [q], [w], scale=[w_scale], per_token_scale=[q_scale], group_list=cumulative, split_item=2,
        group_type=0, group_list_type=0, output_dtype=15,
    )[0]  # fmt: skip
    assert (product[:10].float() - want).norm() / want.norm() < 0.02
    act, act_scale, _ = expert_gemm.grouped_matmul_swiglu_quant(
        q, w, w_scale, q_scale, cumulative, swiglu_limit=10.0
    )
    clamped = swiglu.reference(want, 10.0, None)
    got = act[:10].float() * act_scale[:10, None]
    assert (got - clamped).norm() / clamped.norm() < 0.03


@pytest.mark.parametrize("fp4", [False, True])
def test_mx_products(g, monkeypatch, fp4):
    monkeypatch.setattr("v4_ascend.emulation.stand_in._running_on", [CHIPS["950dt"]])
    x, weight = torch.randn(5, 192, generator=g), torch.randn(2, 64, 192, generator=g)
    values, scale = norm.npu_dynamic_mx_quant(x.to(BF16), dst_type=292)
    packed, w_scale = norm.formats.mx_quant(weight, fp4)
    # [e, n, k/64, 2] of rows to the kernel's [e, k/64, n, 2]
    by_column, matrices = w_scale.transpose(1, 2), packed.transpose(1, 2)
    named = {"antiquant_scale": [by_column], "weight_dtype": 296} if fp4 else {"scale": [by_column]}
    got = gemm.npu_grouped_matmul(
        [values], [matrices], per_token_scale=[scale], group_list=torch.tensor([2, 3]),
        split_item=2, group_type=0, group_list_type=1, output_dtype=6, per_token_scale_dtype=293,
        **named,
    )[0]  # fmt: skip
    want = torch.cat((x[:2] @ weight[0].T, x[2:] @ weight[1].T))
    assert (got - want).norm() / want.norm() < (0.2 if fp4 else 0.06)


def test_fp4_rounds_to_even():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0])
    got = norm.formats.from_fp4(norm.formats.to_fp4(torch.cat((x, -x))))
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert torch.equal(got, torch.cat((want, -want)))


def test_routing_there_and_back(g, chip):
    x = torch.randn(7, 64, generator=g).to(BF16)
    experts = torch.rand(7, 8, generator=g).argsort(-1)[:, :2].int()
    weights = torch.rand(7, 2, generator=g)
    rows, index, counts, _ = routing.npu_moe_init_routing_v2(
        x, experts, active_num=14, expert_num=8, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, 8],
    )  # fmt: skip
    assert counts.tolist() == torch.bincount(experts.flatten(), minlength=8).tolist()
    assert torch.equal(rows[index.long()], x.repeat_interleave(2, 0))
    sorted_experts = torch.empty(14, dtype=torch.int32)
    sorted_experts[index.long()] = experts.flatten()
    assert sorted_experts.tolist() == sorted(experts.flatten().tolist())
    back = routing.npu_moe_token_unpermute(rows, index, weights)
    torch.testing.assert_close(
        back.float(), x.float() * weights.sum(-1, keepdim=True), rtol=2**-7, atol=1e-3
    )


def test_no_chip_is_left_behind():
    assert _running_on == []
