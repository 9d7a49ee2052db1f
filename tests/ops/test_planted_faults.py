"""Kernels that are wrong in one way each, as kernels have been: verify must find every one.

Each is the reference with one fault, so nothing else can be what is found.
"""

import inspect

import pytest
import torch
from planting import planted_kernel

from v4_ascend.backends import BACKENDS
from v4_ascend.ops import OPS, formats
from v4_ascend.runtime.verify import Selection, verify

NAN = float("nan")
FAULTS = []


def _fault(op_name):
    """Plant the decorated function, which takes the op's arguments by name, as a kernel."""

    def register(wrong):
        op = OPS[op_name]

        def kernel(*args, **kwargs):
            bound = op.signature.bind(*args, **kwargs)
            return wrong(op.reference, **bound.arguments)

        kernel.__name__ = wrong.__name__.strip("_")
        kernel.__signature__ = op.signature
        FAULTS.append(pytest.param(op, kernel, id=f"{op_name}-{kernel.__name__}"))
        return wrong

    return register


def _found(op, kernel):
    """How verify judges a planted kernel on the op's cases."""
    with planted_kernel(op, "cpu", kernel):
        results = list(verify(BACKENDS["cpu"], Selection(op.name), lambda done, total: None))
    return [r for r in results if r.kernel == kernel.__name__]


@_fault("fp8_gemm")
def _sums_in_bf16(right, a, a_scale, b, b_scale, out_dtype):
    acc = torch.zeros(len(a), len(b), dtype=torch.bfloat16)
    for block in range(a.shape[1] // 128):
        part = slice(128 * block, 128 * (block + 1))
        scales = (a_scale[:, block : block + 1], b_scale[:, block : block + 1])
        acc += right(a[:, part], scales[0], b[:, part], scales[1], torch.float32).bfloat16()
    return acc.to(out_dtype)


@_fault("grouped_gemm")
def _takes_the_next_expert(right, weight, weight_scale, **rest):
    scale = weight_scale
    if scale is not None:
        scale = scale.view(torch.uint8).roll(1, 0).view(scale.dtype)
    # torch has no roll of e4m3; its bytes roll as well
    as_bytes = weight.view(torch.uint8) if weight.element_size() == 1 else weight
    return right(weight=as_bytes.roll(1, 0).view(weight.dtype), weight_scale=scale, **rest)


@_fault("heads_gemm")
def _gives_each_group_the_next_ones_matrix(right, x, weight):
    return right(x, weight.roll(1, 0))


@_fault("linear")
def _leaves_out_the_last_channel(right, x, weight):
    return right(x[:, :-1], weight[:, :-1])


@_fault("new_rows")
def _turns_rows_by_the_next_groups_start(right, seq_lens, compress_ratio, **rest):
    _, _, slots = right(seq_lens=seq_lens, compress_ratio=compress_ratio, **rest)
    rest["block_table"] = torch.zeros(len(seq_lens), 1 << 10, dtype=torch.int32)
    later = seq_lens + compress_ratio
    return *right(seq_lens=later, compress_ratio=compress_ratio, **rest)[:2], slots


@_fault("new_rows")
def _forgets_the_block_table(right, block_table, **rest):
    there = torch.arange(block_table.numel(), dtype=torch.int32).view_as(block_table)
    return right(block_table=there, **rest)


@_fault("int8_act_quant")
def _cuts_int8_instead_of_rounding(right, x):
    _, scale = right(x)
    return (x.float() / scale.clamp_min(1e-30).unsqueeze(-1)).trunc().to(torch.int8), scale


@_fault("int8_gemm")
def _forgets_the_channels_scale(right, b_scale, **rest):
    return right(b_scale=b_scale.mean().expand_as(b_scale), **rest)


@_fault("grouped_int8_gemm")
def _takes_the_next_int8_expert(right, weight, **rest):
    return right(weight=weight.roll(1, 0), **rest)


@_fault("grouped_int8_gemm_swiglu")
def _activates_without_a_limit(right, limit, **rest):
    return right(limit=1e9, **rest)


@_fault("grouped_int8_gemm_swiglu")
def _rounds_the_product_to_bf16(right, x_scale, weight_scale, limit, **rest):
    product = OPS["grouped_int8_gemm"].reference(
        x_scale=x_scale, weight_scale=weight_scale, out_dtype=torch.bfloat16, **rest
    )
    act = OPS["swiglu"].reference(product, limit, None)
    return formats.quantize_int8(act)


@_fault("rms_norm_int8")
def _quantises_before_it_weighs(right, x, weight, eps):
    values, scale = right(x, torch.ones_like(weight), eps)
    wide = values.float() * scale.unsqueeze(-1) * weight
    return formats.quantize_int8(wide)


@_fault("rms_norm_int8")
def _takes_the_scale_of_the_input(right, x, weight, eps):
    return right(x, weight, eps)[0], formats.quantize_int8(x)[1]


@_fault("expert_layer")
def _weighs_every_choice_alike(right, weights, **rest):
    return right(weights=weights.mean(-1, keepdim=True).expand_as(weights).contiguous(), **rest)


@_fault("expert_layer")
def _counts_tokens_instead_of_rows(right, x, **rest):
    y, load = right(x=x, **rest)
    return y, load.clamp_max(len(x) // 2)


@_fault("fp4_gemm")
def _reads_the_high_nibble_first(right, b, **rest):
    code = formats.unpack_fp4(b).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return right(b=formats.pack_fp4(code), **rest)


@_fault("fp4_act_quant")
def _writes_the_high_nibble_first(right, x, group_size):
    packed, scale = right(x, group_size)
    code = formats.unpack_fp4(packed).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return formats.pack_fp4(code), scale


@_fault("act_quant")
def _scales_one_octave_up(right, x, group_size):
    _, scale = right(x, group_size)
    scale = (scale.view(torch.uint8) + 1).view(formats.E8M0)
    wide = formats.scale_to_float(scale).repeat_interleave(group_size, -1)
    return formats.round_to_fp8(x.float() / wide), scale


@_fault("act_quant")
def _cuts_instead_of_rounding(right, x, group_size):
    _, scale = right(x, group_size)
    wide = formats.scale_to_float(scale).repeat_interleave(group_size, -1)
    near = x.float() / wide
    rounded = near.to(formats.FP8)
    too_far = (rounded.float().abs() > near.abs()).to(torch.uint8)
    return (rounded.view(torch.uint8) - too_far).view(formats.FP8), scale


@_fault("compress_kv")
def _leaves_the_state_as_it_was(right, state, **rest):
    rows, _ = right(state=state.clone(), **rest)
    return rows, state


@_fault("compress_kv")
def _swaps_the_overlapping_halves(right, wkv, wgate, ape, norm_weight, **rest):
    half = len(norm_weight) if len(wkv) > len(norm_weight) else 0
    state = rest.pop("state")
    turned = state.unflatten(-1, (2, -1)).roll(half, -1).flatten(-2)
    weights = {"wkv": wkv.roll(half, 0), "wgate": wgate.roll(half, 0), "ape": ape.roll(half, 1)}
    rows, _ = right(state=turned, norm_weight=norm_weight, **weights, **rest)
    state.copy_(turned.unflatten(-1, (2, -1)).roll(half, -1).flatten(-2))
    return rows, state


@_fault("compress_kv")
def _rotates_by_the_next_position(right, cos, sin, **rest):
    return right(cos=cos.roll(1, 0), sin=sin.roll(1, 0), **rest)


@_fault("sparse_attn")
def _sees_one_token_too_many(right, window_size, **rest):
    return right(window_size=window_size + 1, **rest)


@_fault("sparse_attn")
def _sees_one_token_too_few(right, window_size, **rest):
    return right(window_size=window_size - 1, **rest)


@_fault("sparse_attn")
def _forgets_the_sink(right, sink, **rest):
    return right(sink=torch.full_like(sink, float("-inf")), **rest)


@_fault("sparse_attn")
def _scales_the_sink(right, sink, softmax_scale, **rest):
    return right(sink=sink * softmax_scale, softmax_scale=softmax_scale, **rest)


@_fault("sparse_attn")
def _reads_the_first_requests_blocks(right, window_block_table, **rest):
    return right(window_block_table=window_block_table[:1].expand_as(window_block_table), **rest)


@_fault("sparse_attn")
def _takes_the_absent_row_for_row_0(right, indices, **rest):
    return right(indices=None if indices is None else indices.clamp_min(0), **rest)


@_fault("index_scores")
def _lets_a_group_be_seen_early(right, q, seq_lens, **rest):
    scores = right(q=q, seq_lens=seq_lens, **rest)
    return right(q=q, seq_lens=seq_lens + 1, **rest)[:, : scores.shape[1]]


@_fault("index_scores")
def _forgets_the_relu(right, q, weights, **rest):
    return right(q=q, weights=weights, **rest) - right(q=-q, weights=weights, **rest)


@_fault("index_topk")
def _gives_ties_to_the_higher_row(right, scores, topk):
    ids = right(scores.flip(-1), topk)
    return torch.where(ids < 0, ids, scores.shape[1] - 1 - ids)


@_fault("index_topk")
def _names_rows_that_score_nothing(right, scores, topk):
    return right(scores.nan_to_num(neginf=torch.finfo(torch.float32).min), topk)


@_fault("moe_permute")
def _orders_tokens_backwards(right, x, ids, n_experts):
    _, sizes, source = right(x, ids, n_experts)
    source = torch.cat([part.flip(0) for part in source.split(sizes.tolist())])
    return x[source // ids.shape[1]], sizes, source


@_fault("moe_unpermute")
def _sums_rows_where_they_lie(right, rows, source, topk):
    return right(rows, torch.arange(len(source)), topk)


@_fault("topk_gate")
def _weighs_with_the_bias(right, logits, bias, topk, route_scale):
    _, ids = right(logits, bias, topk, route_scale)
    weights = (torch.nn.functional.softplus(logits).sqrt() + bias).gather(-1, ids)
    return weights / weights.sum(-1, keepdim=True) * route_scale, ids


@_fault("topk_gate")
def _gives_ties_to_the_higher_expert(right, logits, bias, topk, route_scale):
    weights, ids = right(logits.flip(-1), bias.flip(-1), topk, route_scale)
    return weights, logits.shape[1] - 1 - ids


@_fault("hash_gate")
def _does_not_normalise(right, logits, tid2eid, input_ids, route_scale):
    _, ids = right(logits, tid2eid, input_ids, route_scale)
    return torch.nn.functional.softplus(logits).sqrt().gather(-1, ids) * route_scale, ids


@_fault("swiglu")
def _does_not_clamp(right, x, limit, weight):
    return right(x, float("inf"), weight)


@_fault("swiglu")
def _clamps_the_gate_from_below(right, x, limit, weight):
    gate, up = x.chunk(2, dim=-1)
    return right(torch.cat((gate.clamp_min(-limit / 4), up), dim=-1), limit, weight)


@_fault("swiglu_act_quant")
def _takes_one_scale_for_a_row(right, x, limit, weight):
    values, scale = right(x, limit, weight)
    most = scale.view(torch.uint8).amax(-1, keepdim=True).expand(scale.shape).contiguous()
    wide = formats.dequantize_groups(values, scale)
    scale = most.view(formats.E8M0)
    return formats.round_to_fp8(wide / formats.spread_scale(scale, wide.shape, (1, 128))), scale


@_fault("swiglu_act_quant")
def _weighs_what_is_quantised_alone(right, x, limit, weight):
    values, _ = right(x, limit, weight)
    return values, right(x, limit, None)[1]


@_fault("swiglu_act_quant")
def _clamps_the_gate_alone(right, x, limit, weight):
    gate, up = x.chunk(2, dim=-1)
    return right(torch.cat((gate.clamp_max(limit), up), dim=-1), 1e9, weight)


@_fault("rms_norm")
def _forgets_the_last_row(right, x, weight, eps):
    out = torch.full_like(x, NAN)
    out[:-1] = right(x, weight, eps)[:-1]
    return out


@_fault("rms_norm")
def _counts_the_padding(right, x, weight, eps):
    width = 1 << (x.shape[-1] - 1).bit_length()
    return right(x, weight, eps) * (width / x.shape[-1]) ** 0.5


@_fault("rope")
def _pairs_the_halves(right, x, cos, sin):
    turned = 2 * cos.shape[-1]
    order = torch.arange(turned).view(2, -1).T.flatten()
    mixed = torch.cat((x[..., :-turned], x[..., -turned:][..., order]), dim=-1)
    out = right(mixed, cos, sin)
    return torch.cat((out[..., :-turned], out[..., -turned:][..., order.argsort()]), dim=-1)


@_fault("rope_inverse")
def _turns_forward(right, x, cos, sin):
    return right(x, cos, -sin)


@_fault("fp8_round_trip")
def _rounds_what_is_kept(right, x, group_size, n_kept):
    return right(x, group_size, 0)


@_fault("fp4_round_trip")
def _rounds_ties_up(right, x, group_size):
    return right(x * (1 + 2**-7), group_size)


@_fault("hadamard")
def _does_not_scale(right, x):
    return right(x) * x.shape[-1] ** 0.5


@_fault("hc_pre")
def _transposes_comb(right, **inputs):
    y, post, comb = right(**inputs)
    return y, post, comb.transpose(1, 2).contiguous()


@_fault("hc_pre")
def _stops_sinkhorn_after_the_rows(right, hc_eps, **inputs):
    y, post, comb = right(hc_eps=hc_eps, **inputs)
    return y, post, comb / (comb.sum(-1, keepdim=True) + hc_eps)


@_fault("hc_post")
def _sums_over_the_other_index(right, x, residual, post, comb):
    return right(x, residual, post, comb.transpose(1, 2))


@_fault("hc_head")
def _normalises_the_streams(right, x, norm_eps, **inputs):
    norm = torch.rsqrt(x.float().flatten(1).square().mean(-1) + norm_eps).view(-1, 1, 1)
    return right(x=(x.float() * norm).to(x.dtype), norm_eps=norm_eps, **inputs)


@_fault("store_rows")
def _writes_the_skipped_slot(right, storage, rows, slot_mapping, record):
    last = storage.shape[0] * storage.shape[1] - 1
    return right(storage, rows, torch.where(slot_mapping < 0, last, slot_mapping), record)


@_fault("sample")
def _ignores_top_p(right, top_p, **inputs):
    return right(top_p=torch.ones_like(top_p), **inputs)


@_fault("sample")
def _keeps_one_token_too_many(right, top_k, **inputs):
    return right(top_k=top_k + 1, **inputs)


@_fault("sample")
def _compares_min_p_with_one(right, logits, temperature, min_p, **inputs):
    warm = temperature.clamp_min(1e-5).unsqueeze(-1)
    highest = (logits / warm).softmax(-1).amax(-1)
    return right(logits, temperature, min_p=min_p / highest, **inputs)


@pytest.mark.parametrize(("op", "kernel"), FAULTS)
def test_a_planted_fault_is_found(op, kernel):
    results = _found(op, kernel)
    failed = [r.why for r in results if r.outcome == "failed"]
    assert failed, "every case passed"
    for why in failed:  # by its numbers, not because the fault itself cannot run
        assert "differ" in why or "diff " in why or "inf/nan" in why, why


@pytest.mark.parametrize("op", {p.values[0].name: p.values[0] for p in FAULTS}.values())
def test_the_reference_planted_the_same_way_passes(op):
    def unharmed(*args, **kwargs):
        return op.reference(*args, **kwargs)

    unharmed.__signature__ = inspect.signature(op.reference)
    results = _found(op, unharmed)
    assert results
    assert [f"{r.case}: {r.why}" for r in results if r.outcome != "passed"] == []
