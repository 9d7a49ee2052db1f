"""What other implementations got wrong, one fact each.

Every trap T1-T60 has a test named after it, here or in another module, or a reason below.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, GOLDEN, build, caches, hashed_tensor, in_chunks, run

from v4_ascend.config.inventory import inventory
from v4_ascend.model.shard import Shard
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import (
    compress_kv,
    fp4_gemm,
    hc_head,
    hc_pre,
    head_rms_norm,
    index_scores,
    index_select,
    index_topk,
    rope,
    rope_inverse,
    sparse_attn,
    swiglu,
    topk_gate,
)
from v4_ascend.ops.formats import dequantize_fp4, quantize_fp8_block
from v4_ascend.ops.ragged import max_new_rows
from v4_ascend.ops.records import RECORDS, store_rows
from v4_ascend.ops.rope import rope_table
from v4_ascend.runtime.kv_cache import Chunk

NOT_TESTED = {
    9: "no padding: batches are ragged, so no padding token exists to enter a compressor",
    10: "no additive masks: visibility is computed from positions",
    24: "no device streams: the CPU runs operators in order",
    29: "a statement about the published code: streams have the compute dtype",
    42: "e4m3fnuz does not occur: torch's float8_e4m3fn is the only FP8 here",
    44: "needs the trained weights and an accuracy suite",
    45: "a layout of one vendor kernel that does not exist here",
    46: "a statement about unofficial goldens; ours are from the published code with rounding",
    54: "needs the trained weights: perplexity at 16k",
    56: "no fused block norm exists",
    58: "no index is shared between layers: every CSA layer owns its indexer",
}
TOKENS = GOLDEN["tokens"]
I32 = torch.int32


def ints(*values):
    return torch.tensor(values, dtype=I32)


def test_every_trap_is_tested_or_explained():
    text = "".join(p.read_text() for p in Path(__file__).parents[1].rglob("test_*.py"))
    tested = {int(n) for n in re.findall(r"def test_trap_t(\d+)_", text)}
    assert tested | set(NOT_TESTED) == set(range(1, 61))
    assert not tested & set(NOT_TESTED)


def batch_of(n=130):
    cache = caches(CONFIG)
    return cache.batch([Chunk(0, TOKENS[:n], 0)])


def angles(table):
    return torch.atan2(table[1], table[0])


def test_trap_t01_swa_turns_at_theta_10000_and_compressed_layers_at_160000_with_yarn():
    batch = batch_of()
    swa, compressed = angles(batch.rope)[1], angles(batch.compress_rope)[1]
    assert swa[1] == pytest.approx(10000 ** (-2 / 64))
    assert compressed[1] == pytest.approx(160000 ** (-2 / 64))
    assert compressed[-1] == pytest.approx(160000 ** (-62 / 64) / 16, rel=1e-4)


def test_trap_t02_no_attention_factor_scales_cos_and_sin():
    for cos, sin in (batch_of().rope, batch_of().compress_rope):
        torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


@pytest.mark.parametrize("ratio", [4, 128])
def test_trap_t03_compressed_rows_are_rotated_at_the_start_of_their_group(ratio):
    cache = caches(CONFIG)
    batch = cache.batch([Chunk(0, TOKENS[:260], 0)])
    rows, all_positions = batch.compressed[ratio], angles(batch.compress_rope)
    for g in range(260 // ratio):
        torch.testing.assert_close(angles((rows.cos, rows.sin))[g], all_positions[g * ratio])


def test_trap_t04_the_inverse_rotation_undoes_the_query_positions():
    x = torch.randn(3, 2, 8)
    cos, sin = rope_table(torch.tensor([5, 900, 70000]), torch.tensor([1.0, 0.1]))
    torch.testing.assert_close(rope_inverse(rope(x, cos, sin), cos, sin), x)
    assert not torch.allclose(rope(x, cos, sin), x)


def test_trap_t05_pairs_are_neighbours_among_the_last_dims():
    quarter = torch.tensor([[torch.pi / 2, 0.0]])
    got = rope(torch.arange(8.0).unsqueeze(0), quarter.cos(), quarter.sin())
    torch.testing.assert_close(got, torch.tensor([[0.0, 1, 2, 3, -5, 4, 6, 7]]))


def test_trap_t06_angles_are_fp32_products_even_for_bf16_models():
    cos, _ = rope_table(torch.tensor([1000003]), torch.tensor([0.687656]))
    exact = torch.tensor(1000003.0) * torch.tensor(0.687656)
    assert cos.dtype == torch.float32
    assert cos[0, 0] == exact.cos()


def indexed(n_tokens, start=0):
    storage = RECORDS["fp32"].new_storage(2, 32, 4)
    store_rows(storage, torch.ones(64, 4), torch.arange(64), "fp32")
    q, w = torch.ones(n_tokens, 1, 4), torch.ones(n_tokens, 1)
    lengths = (ints(start + n_tokens), ints(0, n_tokens))
    return q, w, storage, "fp32", torch.tensor([[0, 1]], dtype=I32), *lengths, 4


def test_trap_t07_prefill_never_selects_a_group_of_the_future():
    ids = index_select(*indexed(16), 3)
    for t, row in enumerate(ids.tolist()):
        assert all(s == -1 or s < (t + 1) // 4 for s in row)


def test_trap_t08_the_token_that_completes_a_group_sees_it():
    visible = index_scores(*indexed(9)).isfinite().sum(-1)
    assert visible.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def attend(q, window, compressed, indices, sink, ratio=4):
    """One token at position 3 whose window is itself alone."""
    pages = torch.zeros(1, 8, q.shape[-1])
    pages[0, 3] = window
    return sparse_attn(
        q.view(1, 1, -1),
        pages,
        ints(0).view(1, 1),
        compressed.view(1, -1, q.shape[-1]),
        ints(0).view(1, 1),
        indices,
        "fp32",
        ints(4),
        ints(0, 1),
        torch.tensor([sink]),
        1.0,
        1,
        ratio,
    ).flatten()


def test_trap_t11_a_token_without_compressed_rows_is_finite():
    q, row = torch.ones(2), torch.full((1, 2), float("nan"))
    out = attend(q, torch.ones(2), row, ints(-1).view(1, 1), 0.0)
    torch.testing.assert_close(out, torch.ones(2) * torch.sigmoid(torch.tensor(2.0)))


def test_trap_t12_window_and_compressed_rows_share_one_softmax_and_one_sink():
    q = torch.tensor([1.0, 0.0])
    window, row = torch.tensor([0.5, 1.0]), torch.tensor([[2.0, -1.0]])
    out = attend(q, window, row, ints(0).view(1, 1), 0.25)
    p = torch.tensor([0.5, 2.0, 0.25]).softmax(0)
    torch.testing.assert_close(out, p[0] * window + p[1] * row[0])


def test_trap_t13_the_sink_is_not_scaled_and_adds_no_value():
    q, zero = torch.zeros(2), torch.zeros(1, 2)
    out = attend(q, torch.ones(2), zero, ints(-1).view(1, 1), 3.0)
    torch.testing.assert_close(out, torch.ones(2) / (1 + torch.tensor(3.0).exp()))


def test_trap_t14_ties_go_to_the_lower_row():
    scores = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]])
    assert sorted(index_topk(scores, 2)[0].tolist()) == [1, 3]
    assert sorted(index_topk(scores, 4)[0].tolist()) == [0, 1, 3, 5]


def test_trap_t15_relu_comes_before_the_sum_over_heads():
    args = list(indexed(4))
    args[0] = torch.stack((torch.ones(4, 4), -torch.ones(4, 4)), dim=1)
    args[1] = torch.ones(4, 2)
    assert index_scores(*args)[3, 0] == 4.0  # not 4 - 4


def test_trap_t16_minus_one_means_no_row():
    ids = index_select(*indexed(16), 3)
    assert ids[2].tolist() == [-1, -1, -1]
    assert sorted(ids[7].tolist()) == [-1, 0, 1]


def compress(k, z, ape=None):
    """Rows of a CSA compressor whose K and Z are given per token and half.

    A second channel is always 1, so that the norm can be divided out again.
    """
    n = len(k)
    ones = torch.ones(n)
    k, z = torch.tensor(k), torch.tensor(z).repeat_interleave(2, dim=1)
    x = torch.cat((torch.stack((k[:, 0], ones, k[:, 1], ones), dim=1), z), dim=1)
    eye = torch.eye(8)
    n_rows = max_new_rows(n, 1, 4)
    rows, _ = compress_kv(
        x,
        eye[:4],
        eye[4:],
        torch.zeros(4, 4) if ape is None else ape.repeat_interleave(2, dim=1),
        torch.ones(2),
        torch.ones(n_rows, 1),
        torch.zeros(n_rows, 1),
        torch.zeros(1, 8, 8),
        torch.tensor([0]),
        ints(n),
        ints(0, n),
        4,
        1e-6,
    )
    done = rows[: n // 4]
    return (done[:, 0] / done[:, 1]).tolist()


LOW = -1e9


def test_trap_t17_overlap_halves_first_to_the_next_group_second_to_its_own():
    k = [[10.0 + t, 20.0 + t] for t in range(8)]
    only = {3: 0, 6: 1}  # token: half that has weight

    def scores(token, half):
        z = [[LOW, LOW] for _ in range(8)]
        z[token][half] = 0.0
        return z

    # Group 1 takes the first half of token 3 (previous group), the second of token 6 (its own).
    for token, half in only.items():
        row = compress(k, scores(token, half))[1]
        assert row == pytest.approx(k[token][half])


def test_trap_t18_one_softmax_over_eight_slots_and_no_predecessor_for_group_0():
    k = [[1.0, 2.0]] * 8
    z = [[0.0, 0.0]] * 8
    first, second = compress(k, z)
    assert first == pytest.approx(2.0)  # four slots of its own, the missing ones weigh nothing
    assert second == pytest.approx(1.5)  # eight equal slots


def test_trap_t19_ape_is_added_by_position_before_the_shuffle():
    k = [[10.0 + t, 20.0 + t] for t in range(8)]
    ape = torch.full((4, 2), LOW)
    ape[2, 0] = 0.0  # tokens 2 and 6, first half: reaches only the group after theirs
    assert compress(k, [[0.0, 0.0]] * 8, ape)[1] == pytest.approx(k[2][0])


def test_trap_t20_the_norm_comes_after_pooling_in_fp32():
    model = build(CONFIG, with_drafter=False)
    compressor = model.layers[2].attn.compressor
    assert compressor.norm.dtype == compressor.wkv.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 3, 4, 5])
def test_trap_t21_state_is_carried_over_any_chunk_boundary(golden_model, chunk):
    whole = run(golden_model, caches(CONFIG), [40], TOKENS[:40])
    got = run(golden_model, caches(CONFIG), in_chunks(40, chunk), TOKENS[:40])
    torch.testing.assert_close(got, whole, rtol=0, atol=2e-5)


def test_trap_t27_streams_are_not_normalised_only_the_mixing_logits():
    x = torch.randn(2, 4, 8)
    fn, base = torch.zeros(24, 32), torch.zeros(24)
    y, post, _ = hc_pre(x, fn, torch.ones(3), base, 1e-6, 1e-6, 20)
    torch.testing.assert_close(y, x.sum(1) * (0.5 + 1e-6))
    torch.testing.assert_close(post, torch.ones(2, 4))


def test_trap_t25_comb_is_transposed_when_streams_are_mixed():
    from v4_ascend.ops import hc_post

    residual, comb = torch.randn(1, 4, 3), torch.rand(1, 4, 4)
    out = hc_post(torch.zeros(1, 3), residual, torch.zeros(1, 4), comb)
    torch.testing.assert_close(out, comb.transpose(1, 2) @ residual)


def test_trap_t26_the_last_normalisation_is_of_columns():
    fn = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    _, _, comb = hc_pre(torch.ones(1, 4, 8), fn, torch.ones(3), torch.zeros(24), 1e-6, 1e-6, 2)
    columns, rows = comb.sum(1), comb.sum(2)
    assert (columns - 1).abs().max() < 1e-5 < (rows - 1).abs().max()


def test_trap_t28_the_head_collapses_then_norms(golden_model):
    x = torch.randn(1, 4, CONFIG.dim)
    head, c = golden_model.head, CONFIG
    y = hc_head(x, head.hc.fn, head.hc.scale, head.hc.base, c.norm_eps, c.hc_eps)
    normed = y * torch.rsqrt(y.square().mean() + c.norm_eps) * head.norm
    torch.testing.assert_close(head(x), normed @ head.weight.T)


def test_trap_t30_the_routing_weight_is_inside_the_activation():
    x = torch.randn(3, 8)
    weight = torch.tensor([0.5, 2.0, 1.0])
    torch.testing.assert_close(
        swiglu(x, 10.0, weight), swiglu(x, 10.0, None) * weight.unsqueeze(-1)
    )


def test_trap_t31_the_shared_expert_is_clamped_too(golden_model):
    layer = golden_model.layers[0].ffn
    assert layer.shared_experts.swiglu_limit == layer.experts.swiglu_limit == CONFIG.swiglu_limit


@pytest.mark.parametrize("logit", [-80.0, -20.0, 90.0])
def test_trap_t32_the_router_neither_overflows_nor_underflows(logit):
    weights, ids = topk_gate(torch.full((1, 8), logit), torch.zeros(8), 2, 1.5)
    torch.testing.assert_close(weights, torch.full((1, 2), 0.75))
    assert ids.tolist() == [[0, 1]]


def test_trap_t33_the_bias_chooses_and_does_not_weigh():
    bias = torch.tensor([0.0, 9.0, 9.0])
    weights, ids = topk_gate(torch.zeros(1, 3), bias, 2, 1.0)
    assert sorted(ids[0].tolist()) == [1, 2]
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))


def test_trap_t35_a_hash_layer_on_a_later_stage_routes_by_token_ids():
    last_hashed = CONFIG.n_hash_layers - 1
    assert last_hashed > 0
    whole = build(CONFIG, with_drafter=False)
    batch = caches(CONFIG).batch([Chunk(0, TOKENS[:70], 0)])
    seen = {}
    want = whole(batch, caches(CONFIG).layers, lambda layer, x: seen.setdefault(layer, x))
    specs = {s.name: s for s in inventory(CONFIG)}
    stage = Transformer.read(
        lambda name: hashed_tensor(specs[name], CONFIG),
        CONFIG,
        whole.numerics,
        with_drafter=False,
        shard=replace(Shard.whole(CONFIG), layers=(last_hashed, CONFIG.n_layers)),
    )

    def of_stage(batch):
        own = caches(CONFIG).layers[last_hashed : CONFIG.n_layers]
        return stage(batch, own, streams=seen[last_hashed - 1])

    assert torch.equal(of_stage(batch), want)
    others = replace(batch, input_ids=batch.input_ids.roll(1))
    assert not torch.allclose(of_stage(others), want)


def test_trap_t43_indexer_queries_and_keys_are_both_rotated_or_neither():
    for quant_sim in (False, True):
        indexer = build(CONFIG, quant_sim=quant_sim, with_drafter=False).layers[2].attn.indexer
        x = torch.randn(2, 128)
        assert torch.equal(indexer._rotated(x), x) is not quant_sim


def test_trap_t47_the_low_nibble_is_the_even_channel_and_scales_multiply():
    packed = torch.zeros(1, 16, dtype=torch.int8)
    packed[0, 0] = 0x21  # codes 1 (0.5) and 2 (1.0)
    scale = torch.tensor([[128]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert dequantize_fp4(packed, scale)[0, :2].tolist() == [1.0, 2.0]
    a, s = torch.zeros(1, 128, dtype=torch.float8_e4m3fn), torch.ones(1, 1)
    assert fp4_gemm(
        a, s, torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 4), torch.float32
    ).shape == (1, 2)


def test_trap_t49_a_chunk_may_start_anywhere(golden_model):
    whole = run(golden_model, caches(CONFIG), [20], TOKENS[:20])
    got = run(golden_model, caches(CONFIG), [6, 9, 5], TOKENS[:20])
    torch.testing.assert_close(got, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", [*range(124, 134), 255, 256, 257, 258])
def test_trap_t53_every_residue_of_the_prompt_length_continues_alike(golden_model, n):
    whole = run(golden_model, caches(CONFIG), [n + 4], TOKENS[: n + 4])
    got = run(golden_model, caches(CONFIG), [n, 1, 1, 1, 1], TOKENS[: n + 4])
    torch.testing.assert_close(got, whole, rtol=0, atol=2e-5)


def test_trap_t55_pages_of_any_row_count_hold_the_same_rows():
    rows = torch.randn(64, 512)
    for block_rows in (1, 16, 32, 64):
        storage = RECORDS["fp8_584"].new_storage(64 // block_rows, block_rows, 512)
        store_rows(storage, rows, torch.arange(64), "fp8_584")
        table = torch.arange(64 // block_rows, dtype=I32).view(1, -1)
        from v4_ascend.ops.records import load_rows

        got = load_rows(
            storage, "fp8_584", table, torch.zeros(64, dtype=torch.int64), torch.arange(64)
        )
        torch.testing.assert_close(got, rows, rtol=2**-4, atol=2e-2)


def test_trap_t57_the_rotated_part_of_a_row_is_never_quantised_to_fp8():
    row = torch.randn(1, 512).bfloat16()
    for record in ("fp8_584", "fp8_640"):
        storage = RECORDS[record].new_storage(1, 1, 512)
        store_rows(storage, row, torch.tensor([0]), record)
        from v4_ascend.ops.records import load_rows

        zero = torch.tensor([0])
        got = load_rows(storage, record, torch.zeros(1, 1, dtype=I32), zero, zero)
        assert torch.equal(got[0, -64:], row[0, -64:].float())


def test_per_head_norm_has_no_weight():
    q = torch.randn(2, 3, 8)
    torch.testing.assert_close(head_rms_norm(q, 0.0).square().mean(-1), torch.ones(2, 3))
    assert quantize_fp8_block(torch.zeros(2, 2))[0].shape == (2, 2)
