"""Vendor operators in one call for several of V4's: numbers against the references, refusals."""

import pytest
import torch

from v4_ascend.emulation.chips import CHIPS
from v4_ascend.emulation.vendor import batched, expert_gemm, formats, norm
from v4_ascend.ops.rms_norm import rms_norm
from v4_ascend.ops.rope import rope
from v4_ascend.ops.swiglu import swiglu

BF16, E8M0 = torch.bfloat16, formats.ACL_E8M0


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
    return float((got - want).norm() / want.norm())


def activated(x, weight, counts):
    expert = torch.arange(len(weight)).repeat_interleave(counts)
    product = torch.einsum("mk,mkn->mn", x[: len(expert)], weight[expert])
    return swiglu.reference(product, 1e9, None)


@pytest.mark.parametrize("kind", ["int8", "fp8", "mx"])
def test_a_product_with_its_activation_quantised(g, kind):
    x, weight = torch.randn(9, 192, generator=g), torch.randn(3, 192, 256, generator=g) / 14
    counts = torch.tensor([4, 0, 4])
    want = activated(x, weight, counts)
    call = expert_gemm.npu_grouped_matmul_swiglu_quant_v2
    if kind == "mx":
        values, x_scale = formats.mx_quant(x, fp4=False)
        packed, scale = formats.mx_quant(weight.transpose(1, 2), fp4=False)
        mode = {"dequant_mode": 2, "quant_mode": 2, "quant_dtype": formats.ACL_E4M3}
        mode |= {"weight_scale_dtype": E8M0, "x_scale_dtype": E8M0}
        y, y_scale = call(
            values, [packed.transpose(1, 2)], [scale.transpose(1, 2)], x_scale, counts,
            group_list_type=1, **mode,
        )  # fmt: skip
        assert y_scale.shape == (9, 2, 2)
        got = y.float() * formats.mx_scales(y_scale, 128)
    else:
        dtype = torch.int8 if kind == "int8" else formats.FP8
        values, x_scale = formats.per_token(x, dtype)
        packed, scale = formats.per_token(weight.transpose(1, 2), dtype)
        number = 1 if kind == "int8" else formats.SCALAR_E4M3
        y, y_scale = call(
            values, [packed.transpose(1, 2)], [scale], x_scale, counts.cumsum(0),
            quant_dtype=number,
        )  # fmt: skip
        assert y.dtype == dtype
        got = y.float() * y_scale.unsqueeze(-1)
        assert bool(y_scale[8:].isnan().all())  # a row of no expert
    assert error(got[:8], want) < (0.02 if kind == "int8" else 0.08)


@pytest.mark.parametrize(
    ("name", "perms"),
    [
        ("a3", {"perm_x1": [1, 0, 2]}),
        ("a3", {"perm_x1": [0, 1, 2]}),
        ("950dt", {"perm_x1": [1, 0, 2], "perm_x2": [0, 2, 1]}),
    ],
)
def test_a_plain_product_per_group_of_heads(chip, g, name, perms):
    chip(name)
    x, weight = torch.randn(5, 8, 32, generator=g), torch.randn(8, 16, 32, generator=g)
    of_call = (
        x if perms["perm_x1"][0] else x.transpose(0, 1),
        weight if "perm_x2" in perms else weight.transpose(1, 2),
    )
    got = batched.npu_transpose_batchmatmul(*of_call, **perms, perm_y=[1, 0, 2])
    torch.testing.assert_close(got, torch.einsum("mbk,bnk->mbn", x, weight))


def test_a_plain_product_per_group_refuses_what_a3_does(chip):
    call, swaps = batched.npu_transpose_batchmatmul, {"perm_x1": [1, 0, 2]}
    pro = torch.zeros(1, 16, 4096, dtype=BF16), torch.zeros(16, 4096, 16, dtype=BF16)
    odd = torch.zeros(1, 2, 24, dtype=BF16), torch.zeros(2, 24, 16, dtype=BF16)
    for x, weight in (pro, odd):
        call(x, weight, **swaps)  # the 950 has no such limits
    chip("a3")
    call(pro[0].transpose(0, 1), pro[1])
    for said, refused in (
        (r"groups \* k is 65536; swapped by perm_x1", lambda: call(*pro, **swaps)),
        (r"\(groups, k, n\) is \(2, 24, 16\)", lambda: call(*odd, **swaps)),
        (r"perm_x2 is \[0, 2, 1\]", lambda: call(*pro, **swaps, perm_x2=[0, 2, 1])),
    ):
        with pytest.raises(RuntimeError, match=said):
            refused()


@pytest.mark.parametrize("by_row", [False, True])
def test_a_product_per_group_of_heads(g, by_row):
    x, weight = torch.randn(5, 8, 128, generator=g), torch.randn(8, 64, 128, generator=g)
    values, x_scale = formats.mx_quant(x, fp4=False)
    packed, scale = formats.mx_quant(weight, fp4=False)
    if not by_row:
        packed, scale = packed.transpose(1, 2), scale.transpose(1, 2)
    e8m0 = torch.float8_e8m0fnu
    got = batched.npu_transpose_quant_batchmatmul(
        values, packed, 15, x1_scale=x_scale.view(e8m0),
        x2_scale=scale.contiguous().view(e8m0), group_sizes=[0, 0, 32],
        perm_x2=[0, 2, 1] if by_row else [0, 1, 2],
    )  # fmt: skip
    assert got.dtype == BF16
    assert error(got.float(), torch.einsum("mbk,bnk->mbn", x, weight)) < 0.06


def test_a_product_per_group_with_a_factor_per_channel(g):
    x, weight = torch.randn(5, 2, 512, generator=g), torch.randn(2, 512, 128, generator=g)
    x_scale, scale = torch.rand(5, generator=g) + 1, torch.rand(128, generator=g) + 1
    got = batched.npu_transpose_quant_batchmatmul(
        formats.to_fp8(x), formats.to_fp8(weight), 15, x1_scale=x_scale, x2_scale=scale
    )
    want = torch.einsum("mbk,bkn->mbn", x, weight) * scale * x_scale[:, None, None]
    assert error(got.float(), want) < 0.06


@pytest.mark.parametrize("scale_alg", [0, 1])
def test_a_sum_normed_and_quantised(g, scale_alg):
    a, b = (torch.randn(4, 160, generator=g).to(BF16) for _ in range(2))
    weight = torch.rand(160, generator=g)
    y, total, scale, _ = norm.npu_add_rms_norm_dynamic_mx_quant(
        a, b, weight, dst_type=292, scale_alg=scale_alg
    )
    assert torch.equal(total, a + b)
    factors = formats.mx_scales(scale, 160)
    want = rms_norm.reference(a.float() + b.float(), weight, 1e-6)
    assert error(y.float() * factors, want) < 0.04
    largest = want.abs().unflatten(-1, (5, 32)).amax(-1)
    within = largest / factors[:, ::32]
    # Rounded up nothing saturates, and the next smaller scale would not do; down, some may.
    if scale_alg:
        assert bool((within <= 448).all())
        assert bool((within > 224).all())
    else:
        assert bool(((within >= 256) & (within < 512)).all())


def test_an_interleaved_rope_leaves_pairs_apart(g):
    """V4 keeps pairs side by side; this one returns them as halves of the head."""
    x = torch.randn(3, 2, 1, 64, generator=g)
    angle = torch.rand(3, 32, generator=g)
    wide = [t.repeat(1, 2).view(3, 1, 1, 64) for t in (angle.cos(), angle.sin())]
    got = norm.npu_interleave_rope(x, *wide)
    want = rope.reference(x[:, :, 0], angle.cos(), angle.sin())
    torch.testing.assert_close(got[:, :, 0], torch.cat((want[..., ::2], want[..., 1::2]), -1))


def fused(**changes):
    x = torch.zeros(4, 64, dtype=torch.int8)
    call = {
        "x": x, "weight": [torch.zeros(2, 64, 128, dtype=torch.int8)],
        "weight_scale": [torch.ones(2, 128)], "x_scale": torch.ones(4),
        "group_list": torch.tensor([2, 4]),
    }  # fmt: skip
    return expert_gemm.npu_grouped_matmul_swiglu_quant_v2(**(call | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dequant_mode": 1}, "dequant_mode is 1; it must be 0, 2"),
        ({"dequant_mode": 2}, "quant_mode is 0; it must be 2"),
        ({"dequant_mode": 2, "quant_mode": 2}, "the scales' dtypes is"),
        ({"quant_dtype": 292}, "quant_dtype is 292; it must be 0, 1"),
        ({"bias": torch.zeros(2, 128)}, "bias is given; it must be None"),
        ({"smooth_scale": torch.zeros(2)}, "int4 weights are not emulated"),
        ({"weight_dtype": 296}, "hifloat8 and fp4 are not emulated"),
        ({"weight": [torch.zeros(2, 32, 128, dtype=torch.int8)]}, "weight.shape"),
        ({"group_list": torch.tensor([2, 5])}, "group_list's total is 5"),
    ],
)
def test_fused_products_refuse(changes, said):
    fused()
    with pytest.raises(RuntimeError, match=said):
        fused(**changes)


def test_older_chips_take_int8_alone(chip):
    chip("a3")
    fused()
    narrow = {"x": torch.zeros(4, 64).to(formats.FP8), "quant_dtype": 24}
    for changes, said in (
        (narrow, "x.dtype is torch.float8_e4m3fn; it must be int8"),
        ({"dequant_mode": 2}, "dequant_mode is 2; it must be 0"),
    ):
        with pytest.raises(RuntimeError, match=said):
            fused(**changes)
    x, table = torch.zeros(1, 3, 1, 64), torch.zeros(1, 1, 1, 64)
    with pytest.raises(RuntimeError, match="x.dtype is torch.float32; it must be bfloat16"):
        norm.npu_interleave_rope(x, table, table)
    x, table = x.to(BF16), table.to(BF16)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        norm.npu_interleave_rope(x.repeat(1, 1, 1, 2)[..., ::2], table, table)


def test_the_others_refuse(g):
    x, weight = torch.zeros(2, 1, 64).to(formats.FP8), torch.zeros(1, 64, 32).to(formats.FP8)
    e8m0 = torch.ones(2, 1, 1, 2).to(torch.float8_e8m0fnu)
    by_column = torch.ones(1, 1, 32, 2).to(torch.float8_e8m0fnu)
    scales = {"x1_scale": e8m0, "x2_scale": by_column}
    a, gamma = torch.zeros(2, 63, dtype=BF16), torch.zeros(63)
    bmm, add = batched.npu_transpose_quant_batchmatmul, norm.npu_add_rms_norm_dynamic_mx_quant
    bmm(x, weight, 15, **scales, group_sizes=[1, 1, 32])
    for said, call in (
        ("group_sizes is", lambda: bmm(x, weight, 15, **scales, group_sizes=[1, 1, 128])),
        (r"\(k, n\) is \(64, 32\); it must be \(512, 128\)", lambda: bmm(x, weight, 15, **scales)),
        ("dtype is 6", lambda: bmm(x, weight, 6, **scales)),
        ("perm_x1 is", lambda: bmm(x, weight, 15, **scales, perm_x1=[0, 1, 2])),
        ("x1_scale is None", lambda: bmm(x, weight, 15, group_sizes=[1, 1, 32])),
        ("even for fp4", lambda: add(a, a, gamma)),
        ("scale_alg is 1; it must be 0", lambda: add(a, a, gamma, scale_alg=1)),
        ("x2.dtype", lambda: add(a, a.float(), gamma, dst_type=292)),
        ("cos.shape", lambda: norm.npu_interleave_rope(
            torch.zeros(2, 1, 1, 64), torch.zeros(2, 2, 1, 64), torch.zeros(2, 1, 1, 64))),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=said):
            call()
