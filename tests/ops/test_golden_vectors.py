"""The references against vectors made with the published functions (see tests/data/README.md)."""

import json
import math
from pathlib import Path

import pytest
import torch

from v4_ascend.ops import (
    act_quant,
    compress_kv,
    fp4_round_trip,
    fp8_round_trip,
    hadamard,
    hc_post,
    rope,
    sparse_attn,
    swiglu,
    topk_gate,
)
from v4_ascend.ops.compress_kv import row_positions, state_rows
from v4_ascend.ops.formats import fp4_value, scale_to_float
from v4_ascend.ops.gate import _scores
from v4_ascend.ops.hyper_connection import split_sinkhorn
from v4_ascend.ops.ragged import max_new_rows
from v4_ascend.ops.rope import rope_freqs, rope_table

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_vectors.json").read_text())
TOL = {"rtol": 1e-6, "atol": 1e-6}
YARN = {"factor": 16, "original_seq_len": 65536, "beta_fast": 32, "beta_slow": 1}


def wave(f, shape, step, start=0.0):
    n = math.prod(shape)
    return torch.tensor([f(step * i + start) for i in range(n)]).view(shape)


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want).view(got.shape), **TOL)


def test_yarn_frequencies():
    close(rope_freqs(64, 160000.0, **YARN), GOLDEN["freqs_compress_position1_angle"])


def test_plain_frequencies():
    close(rope_freqs(64, 10000.0), GOLDEN["freqs_swa_position1_angle"])


@pytest.mark.parametrize("position", GOLDEN["compress_freqs_angle_check"])
def test_angles_at_long_context_are_rounded_to_fp32(position):
    want = GOLDEN["compress_freqs_angle_check"][position]
    cos, sin = rope_table(torch.tensor([int(position)]), rope_freqs(64, 160000.0, **YARN))
    n = len(want["cos"])
    # The vectors list a few pairs of the 32, spread evenly or the first ones.
    for got, name in ((cos[0], "cos"), (sin[0], "sin")):
        pairs = [int((got - w).abs().argmin()) for w in want[name]]
        torch.testing.assert_close(got[pairs], torch.tensor(want[name]), rtol=0, atol=2e-6)
        assert pairs == sorted(pairs)
        assert len(set(pairs)) == n


def test_rope_rotates_interleaved_pairs():
    cos, sin = rope_table(torch.tensor([5]), rope_freqs(64, 160000.0, **YARN))
    close(rope(wave(math.sin, (1, 64), 0.37), cos, sin), GOLDEN["rope"]["out"])


@pytest.mark.parametrize("vector", GOLDEN["act_quant"], ids=lambda v: str(v["input"][0]))
def test_act_quant_bytes(vector):
    n = len(vector["input"])
    x = torch.zeros(1, vector["group"])
    x[0, :n] = torch.tensor(vector["input"])
    values, scale = act_quant(x, vector["group"])
    assert values.view(torch.uint8)[0, :n].tolist() == vector["bytes"]
    assert float(scale_to_float(scale)) == vector["scale"]
    back = fp8_round_trip(x.bfloat16(), vector["group"], 0)[0, :n]
    assert back.tolist() == vector["dequant_bf16"]


@pytest.mark.parametrize("vector", GOLDEN["fp4_act_quant"], ids=lambda v: str(v["input"]))
def test_fp4_rounds_ties_to_even_codes(vector):
    x = torch.zeros(1, 32)
    x[0, : len(vector["input"])] = torch.tensor(vector["input"])
    got = fp4_round_trip(x, 32)[0, : len(vector["dequant"])].tolist()
    assert [math.copysign(1, v) for v in got] == [math.copysign(1, v) for v in vector["dequant"]]
    assert got == vector["dequant"]


def test_fp4_codes():
    table = fp4_value(torch.arange(16)).tolist()
    assert table == GOLDEN["fp4_table_low_nibble_first"]


def test_hadamard_is_sylvester_ordered():
    vector = GOLDEN["hadamard_8"]
    close(hadamard(torch.tensor([vector["input"]])), vector["out"])


def sinkhorn():
    i = torch.arange(24, dtype=torch.float32)
    mixes, base = 2 * torch.sin(1.7 * i).unsqueeze(0), torch.cos(0.9 * i)
    return split_sinkhorn(mixes, torch.tensor([0.5, 1.5, 2.0]), base, 20, 1e-6)


def test_sinkhorn_splits_as_published():
    pre, post, comb = sinkhorn()
    want = GOLDEN["hc_split"]
    close(pre, want["pre"])
    close(post, want["post"])
    close(comb, want["comb_row_major_jk"])


def test_hc_post_sums_over_the_first_index_of_comb():
    _, post, comb = sinkhorn()
    residual = torch.sin(0.5 * torch.arange(12, dtype=torch.float32)).view(1, 4, 3)
    close(hc_post(torch.tensor([[1.0, -2.0, 0.5]]), residual, post, comb), GOLDEN["hc_post"]["out"])


def test_the_gate_chooses_with_the_bias_and_weighs_without():
    vector = GOLDEN["gate"]
    logits, bias = torch.tensor([vector["logits"]]), torch.tensor(vector["bias"])
    close(_scores(logits), vector["scores"])
    weights, ids = topk_gate(logits, bias, 3, 1.5)
    assert ids.tolist() == [vector["top3"]]
    close(weights, vector["weights_route_scale_1_5"])


def test_sqrtsoftplus():
    vector = GOLDEN["sqrtsoftplus"]
    close(_scores(torch.tensor(vector["x"], dtype=torch.float32)), vector["y"])


def test_swiglu_clamps_the_gate_above_only():
    vector = GOLDEN["swiglu_limit10"]
    x = torch.tensor([vector["gate"] + vector["up"]])
    close(swiglu(x, 10.0, None), vector["out"])


def test_attention_with_a_sink():
    vector = GOLDEN["sink_attention"]
    q = torch.tensor([[[math.sin(0.3 * (4 * h + d)) for d in range(4)] for h in range(2)]])
    kv = torch.tensor([[[math.cos(0.7 * (4 * n + d)) for d in range(4)] for n in range(3)]])
    # Rows 0, 2, 1 of the vector: token 0 in the window, rows 2 and 1 as compressed ones.
    compressed = torch.stack((kv[0, 2], kv[0, 1])).unsqueeze(0)
    out = sparse_attn(
        q,
        torch.cat((torch.zeros(1, 7, 4), kv[:, :1]), dim=1),  # position 7 is the only one seen
        torch.tensor([[0]], dtype=torch.int32),
        compressed,
        torch.tensor([[0]], dtype=torch.int32),
        torch.tensor([[0, -1, 1]], dtype=torch.int32),
        "fp32",
        torch.tensor([8], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0.3, -1.0]),
        0.5,
        1,
        4,
    )
    close(out, vector["out"])


@pytest.mark.parametrize(("ratio", "coff", "n_tokens"), [(4, 2, 11), (8, 1, 19)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 19])
def test_the_compressor_at_any_chunking(ratio, coff, n_tokens, chunk):
    vector = GOLDEN[f"compressor_ratio{ratio}"]
    dim, head_dim = 6, 8
    x = wave(math.sin, (n_tokens, dim), 0.13)
    weights = {
        "wkv": wave(math.sin, (coff * head_dim, dim), 0.31),
        "wgate": 2 * wave(math.cos, (coff * head_dim, dim), 0.17),
        "ape": wave(math.sin, (ratio, coff * head_dim), 0.23),
        "norm_weight": 1 + 0.1 * wave(math.cos, (head_dim,), 1.0),
    }
    freqs = rope_freqs(4, 160000.0, **YARN)
    state = torch.full((1, state_rows(ratio, coff == 2), 2 * coff * head_dim), float("nan"))
    rows = []
    for start in range(0, n_tokens, chunk):
        part = x[start : start + chunk]
        seq_lens = torch.tensor([start + len(part)], dtype=torch.int32)
        cu_seqlens = torch.tensor([0, len(part)], dtype=torch.int32)
        done = row_positions(seq_lens, cu_seqlens, ratio)
        positions = torch.zeros(max_new_rows(len(part), 1, ratio), dtype=torch.int64)
        positions[: len(done)] = torch.tensor(done, dtype=torch.int64)
        cos, sin = rope_table(positions, freqs)
        slots = torch.tensor([0])
        out, state = compress_kv(
            part,
            *weights.values(),
            cos,
            sin,
            state,
            slots,
            seq_lens,
            cu_seqlens,
            ratio,
            1e-6,
        )
        rows.append(out[: len(done)])
    got = torch.cat(rows)
    torch.testing.assert_close(got, torch.tensor(vector["entries"]), rtol=2e-6, atol=2e-6)
    last = state[0, (n_tokens - 1) % state.shape[1], coff * head_dim :]
    torch.testing.assert_close(
        last, torch.tensor(vector["score_state_row_last_partial"]), rtol=2e-6, atol=5e-6
    )
