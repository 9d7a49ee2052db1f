"""Vendor operators that do not fit V4: what their stand-ins give, beside what V4 asks for.

docs/ascend.md names the test of each. A stand-in that came to fit would fail here, and the operator
would have to be called.
"""

import pytest
import torch

from v4_ascend.emulation.chips import CHIPS
from v4_ascend.emulation.vendor import batched, expert_gemm, formats, gate, norm
from v4_ascend.ops import act_quant, fp8_gemm, heads_gemm, rms_norm, rope, topk_gate
from v4_ascend.ops.check import assert_close
from v4_ascend.ops.formats import quantize_fp8_block
from v4_ascend.ops.rope import rope_freqs, rope_table
from v4_ascend.ops.swiglu import swiglu

BF16, E8M0, E4M3 = torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn
LIMIT = 10.0  # of V4's activation


@pytest.fixture(autouse=True)
def chip(monkeypatch):
    def use(name):
        monkeypatch.setattr("v4_ascend.emulation.stand_in._running_on", [CHIPS[name]])

    use("950dt")
    return use


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def error(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("name", ["a2", "a3", "950dt"])
def test_a_grouped_product_with_an_activation_that_has_no_limit(chip, g, name):
    """Of rows below the limit it is right, and wrong of those that reach it, as V4's do."""
    chip(name)
    weight = torch.randn(1, 64, 256, generator=g) / 8
    values, scale = formats.per_token(weight.transpose(1, 2), torch.int8)

    def made(size):
        rows, row_scale = formats.per_token(size * torch.randn(6, 64, generator=g), torch.int8)
        y, y_scale = expert_gemm.npu_grouped_matmul_swiglu_quant_v2(
            rows, [values.transpose(1, 2)], [scale], row_scale, torch.tensor([6])
        )
        product = (rows.float() * row_scale.unsqueeze(-1)) @ (
            values[0].float() * scale[0].unsqueeze(-1)
        ).T
        return y.float() * y_scale.unsqueeze(-1), swiglu.reference(product, LIMIT, None)

    assert error(*made(1.0)) < 0.02  # of int8's rounding
    assert error(*made(20.0)) > 0.3


def test_a_grouped_product_takes_no_fp4_weights_with_fp8_rows(g):
    """V4's own experts: MXFP4 weights, e4m3 rows."""
    x, scale = formats.mx_quant(torch.randn(4, 128, generator=g), fp4=False)
    weight = torch.zeros(1, 64, 256, dtype=torch.uint8)
    weight_scale = torch.full((1, 2, 256, 2), 127, dtype=torch.uint8)
    mx = {"dequant_mode": 2, "quant_mode": 2, "quant_dtype": formats.ACL_E4M3}
    mx |= {"weight_scale_dtype": formats.ACL_E8M0, "x_scale_dtype": formats.ACL_E8M0}
    with pytest.raises(RuntimeError, match="weight.dtype is torch.uint8"):
        expert_gemm.npu_grouped_matmul_swiglu_quant_v2(
            x, [weight], [weight_scale], scale, torch.tensor([4]), **mx
        )


def _product(values, factors, weight, weight_scale):
    """What the products make of activations: their values, by the published weight."""
    wide = weight_scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return ((values.float() * factors) @ (weight.float() * wide).T).to(BF16)


def _of_32_and_of_128(x, values, scale, g):
    """The same rows by the vendor's scales and by DeepSeek's, and the products of both."""
    weight = quantize_fp8_block(torch.randn(128, x.shape[1], generator=g) * x.shape[1] ** -0.5)
    rows, row_scale = act_quant.reference(x, 128)
    right = fp8_gemm.reference(rows, row_scale, *weight, BF16)
    return (values, rows), (_product(values, formats.mx_scales(scale, x.shape[1]), *weight), right)


def test_a_quantiser_with_a_scale_per_32_channels(g):
    """Other bytes than DeepSeek's, and another product; a group of 128 is refused."""
    x = torch.randn(8, 512, generator=g).to(BF16) * torch.rand(512, generator=g).to(BF16)
    values, scale = norm.npu_dynamic_mx_quant(x, dst_type=formats.ACL_E4M3)
    assert scale.shape == (8, 8, 2)  # DeepSeek's are [8, 4]
    (mine, rows), (product, right) = _of_32_and_of_128(x, values, scale, g)
    assert (mine.view(torch.uint8) != rows.view(torch.uint8)).float().mean() > 0.2
    with pytest.raises(AssertionError):
        assert_close(product, right, fp8_gemm.tolerance)
    with pytest.raises(RuntimeError, match="block_size is 128; it must be 32"):
        norm.npu_dynamic_mx_quant(x, dst_type=formats.ACL_E4M3, block_size=128)


@pytest.mark.parametrize("scale_alg", [0, 1])
def test_a_norm_with_a_scale_per_32_channels(g, scale_alg):
    """Rounded down or up, its scales are not DeepSeek's."""
    x, gamma = torch.randn(8, 512, generator=g).to(BF16), torch.rand(512, generator=g)
    values, _, scale, _ = norm.npu_add_rms_norm_dynamic_mx_quant(
        x, torch.zeros_like(x), gamma, dst_type=formats.ACL_E4M3, scale_alg=scale_alg
    )
    normed = rms_norm.reference(x, gamma, 1e-6)
    (mine, rows), (product, right) = _of_32_and_of_128(normed, values, scale, g)
    assert (mine.view(torch.uint8) != rows.view(torch.uint8)).float().mean() > 0.2
    with pytest.raises(AssertionError):
        assert_close(product, right, fp8_gemm.tolerance)


@pytest.mark.parametrize("name", ["a2", "a3"])
def test_a_gate_without_the_root_of_softplus(chip, g, name):
    """A2 and A3 have two other scores, no table of experts, and both weigh experts otherwise."""
    chip(name)
    logits, bias = torch.randn(64, 256, generator=g), torch.randn(256, generator=g)
    call = gate.npu_moe_gating_top_k
    with pytest.raises(RuntimeError, match="norm_type is 2; it must be 0, 1"):
        call(logits, 6, bias=bias, norm_type=2)
    with pytest.raises(RuntimeError, match="hash routing is 950 only"):
        call(logits, 6, input_ids=torch.zeros(64, dtype=torch.int64), norm_type=1)
    weights, experts = topk_gate.reference(logits, bias, 6, 1.0)
    for norm_type in (0, 1):
        got, chosen, _ = call(logits, 6, bias=bias, norm_type=norm_type)
        assert not torch.equal(chosen, experts)
        assert error(got, weights) > 0.1


def test_a_rotation_that_takes_pairs_apart(g):
    """Its first half are the pairs' firsts; `npu_rotary_mul` leaves the pairs as V4 keeps them."""
    x = torch.randn(16, 64, generator=g)
    cos, sin = rope_table(torch.arange(16) * 60000, rope_freqs(64, 10000.0))
    want = rope.reference(x, cos, sin)
    halves = [torch.cat((t, t), -1).view(16, 1, 1, 64) for t in (cos, sin)]
    pairs = [t.repeat_interleave(2, -1).view(16, 1, 1, 64) for t in (cos, sin)]
    rows = x.view(16, 1, 1, 64)
    apart = norm.npu_interleave_rope(rows, *halves).view(16, 64)
    assert error(apart, want) > 1
    assert_close(apart.unflatten(-1, (2, 32)).mT.flatten(-2), want, rope.tolerance)
    as_v4 = norm.npu_rotary_mul(rows, *pairs, rotary_mode="interleave").view(16, 64)
    assert_close(as_v4, want, rope.tolerance)


@pytest.mark.parametrize("name", ["a2", "a3"])
def test_a_rotation_with_bf16_angles(chip, g, name):
    """A2 and A3 take no fp32, and with tables as narrow as the rows the angles are too coarse."""
    chip(name)
    x = torch.randn(16, 64, generator=g).to(BF16)
    cos, sin = rope_table(torch.arange(16) * 60000, rope_freqs(64, 10000.0))
    wide = [torch.cat((t, t), -1).view(16, 1, 1, 64) for t in (cos, sin)]
    with pytest.raises(RuntimeError, match="x.dtype is torch.float32"):
        norm.npu_interleave_rope(x.float().view(16, 1, 1, 64), *wide)
    got = norm.npu_interleave_rope(x.view(16, 1, 1, 64), *(t.to(BF16) for t in wide))
    in_pairs = got.view(16, 2, 32).mT.flatten(-2)
    with pytest.raises(AssertionError):
        assert_close(in_pairs, rope.reference(x, cos, sin), rope.tolerance)


def test_a_product_per_group_that_quantises_its_input(g):
    """`wo_a` of FP8 weights is exact; its input, in e4m3 with a scale per 32 channels, is not."""
    x = torch.randn(33, 8, 512, generator=g).to(BF16)
    weight, scale = formats.mx_quant(torch.randn(8, 128, 512, generator=g) / 22, fp4=False)
    wide = (weight.float() * formats.mx_scales(scale, 512)).to(BF16)
    values, x_scale = formats.mx_quant(x, fp4=False)
    call = batched.npu_transpose_quant_batchmatmul
    factors = {"x1_scale": x_scale.view(E8M0), "x2_scale": scale.view(E8M0)}
    swapped = {"perm_x2": [0, 2, 1], "group_sizes": [0, 0, 32]}
    got = call(values, weight, formats.SCALAR_BF16, **factors, **swapped)
    want = heads_gemm.reference(x, wide)
    assert 0.01 < error(got, want) < 0.05
    with pytest.raises(AssertionError):
        assert_close(got, want, heads_gemm.tolerance)
    rounded = (values.float() * formats.mx_scales(x_scale, 512)).to(BF16)  # all of the difference
    assert_close(got, heads_gemm.reference(rounded, wide), heads_gemm.tolerance)
    with pytest.raises(RuntimeError, match="x1.dtype is torch.bfloat16"):
        call(x, weight, formats.SCALAR_BF16, **factors, **swapped)
