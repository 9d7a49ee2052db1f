"""What our stand-ins return, against the vendor's own Meta kernels (torch_npu 2.13.0)."""

import pytest
import torch
import torch_npu

NPU = "npu:0"
BF16, I32 = torch.bfloat16, torch.int32


def t(*shape, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return (values * 3).to(dtype).to(NPU)


def ints(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=NPU)


def scales(*shape):
    return torch.full(shape, 127, dtype=torch.uint8, device=NPU).view(torch.float8_e8m0fnu)


EXPERTS = {"split_item": 2, "group_type": 0, "group_list_type": 1}
ROUTING = {
    "active_num": 10, "expert_num": 8, "expert_tokens_num_type": 1,
    "expert_tokens_num_flag": True, "active_expert_range": [0, 8],
}  # fmt: skip
E8M0 = torch_npu.float8_e8m0fnu


def calls():
    ids = ints([[0, 1], [2, 3], [4, 5], [6, 7], [0, 7]], I32)
    table = ints([[0, 1], [2, 3], [4, 5]], I32)
    counts = ints([4, 0, 3, 3])
    e4 = torch.float8_e4m3fn
    yield "npu_rms_norm", (t(5, 64, dtype=BF16), t(64, dtype=BF16)), {}
    yield "npu_mhc_pre", (t(5, 4, 128, dtype=BF16), t(24, 512), t(3), t(24)), {}
    yield "npu_mhc_sinkhorn", (t(5, 4, 4),), {}
    post = (t(5, 4, 128, dtype=BF16), t(5, 4, 4), t(5, 128, dtype=BF16), t(5, 4))
    yield "npu_mhc_post", post, {}
    yield "npu_moe_gating_top_k", (t(5, 8), 2), {"bias": t(8), "norm_type": 2}
    hashed = {"input_ids": ints([0, 1, 2, 1, 0]), "tid2eid": table, "norm_type": 2}
    yield "npu_moe_gating_top_k", (t(5, 8), 2), hashed
    for mode in (-1, 1, 3):
        yield "npu_moe_init_routing_v2", (t(5, 64, dtype=BF16), ids), ROUTING | {"quant_mode": mode}
    order = ints(list(range(10)), I32)
    yield "npu_moe_token_unpermute", (t(10, 64, dtype=BF16), order, t(5, 2)), {}
    plain = ([t(10, 64, dtype=BF16)], [t(4, 64, 32, dtype=BF16)])
    yield "npu_grouped_matmul", plain, {"group_list": counts, **EXPERTS}
    int8 = ([t(10, 64, dtype=torch.int8)], [t(4, 64, 32, dtype=torch.int8)])
    factors = {"scale": [t(4, 32)], "per_token_scale": [t(10)], "output_dtype": 15}
    yield "npu_grouped_matmul", int8, {"group_list": counts, **EXPERTS, **factors}
    w4a8 = ([t(10, 64, dtype=e4)], [t(4, 32, 32, dtype=torch.int8).view(torch.uint8)])
    factors = {
        "antiquant_scale": [scales(4, 1, 32, 2)], "per_token_scale": [scales(10, 1, 2)],
        "output_dtype": 15, "weight_dtype": torch_npu.float4_e2m1fn_x2,
        "per_token_scale_dtype": E8M0,
    }  # fmt: skip
    yield "npu_grouped_matmul", w4a8, {"group_list": counts, **EXPERTS, **factors}
    yield "npu_dynamic_quant", (t(5, 64, dtype=BF16),), {}
    yield "npu_dynamic_quant", (t(5, 64, dtype=BF16),), {"dst_type": 292}
    yield "npu_dynamic_mx_quant", (t(5, 160, dtype=BF16),), {"dst_type": 292}
    yield "npu_dynamic_mx_quant", (t(5, 160, dtype=BF16),), {"dst_type": 296}
    product = (t(5, 64, dtype=torch.int8), t(64, 32, dtype=torch.int8), t(32))
    yield "npu_quant_matmul", product, {"pertoken_scale": t(5), "output_dtype": 15}
    mx = (t(5, 64, dtype=e4), t(64, 32, dtype=e4), scales(1, 32, 2))
    named = {"pertoken_scale": scales(5, 1, 2), "output_dtype": 15, "group_sizes": [1, 1, 32]}
    named |= {"scale_dtype": E8M0, "pertoken_scale_dtype": E8M0}
    yield "npu_quant_matmul", mx, named
    blocks = (t(5, 256, dtype=e4), t(256, 128, dtype=e4), t(2, 1))
    named = {"pertoken_scale": t(5, 2), "output_dtype": 15, "group_sizes": [1, 128, 128]}
    yield "npu_quant_matmul", blocks, named
    batched = (t(5, 8, 64, dtype=BF16), t(8, 64, 32, dtype=BF16))
    perms = {"perm_x1": [1, 0, 2], "perm_x2": [0, 1, 2], "perm_y": [1, 0, 2]}
    yield "npu_transpose_batchmatmul", batched, perms
    factors = {"x1_scale": scales(5, 8, 1, 2), "x2_scale": scales(8, 1, 32, 2)}
    narrow = (t(5, 8, 64, dtype=e4), t(8, 64, 32, dtype=e4), 15)
    yield "npu_transpose_quant_batchmatmul", narrow, perms | factors | {"group_sizes": [0, 0, 32]}
    factors = {"x1_scale": t(5), "x2_scale": t(128)}
    narrow = (t(5, 8, 512, dtype=e4), t(8, 512, 128, dtype=e4), 15)
    yield "npu_transpose_quant_batchmatmul", narrow, perms | factors
    ends = ints([4, 4, 7, 10])
    fused = ([t(4, 64, 256, dtype=torch.int8)], [t(4, 256)], t(10).abs(), ends)
    yield "npu_grouped_matmul_swiglu_quant_v2", (t(10, 64, dtype=torch.int8), *fused), {}
    fused = ([t(4, 64, 256, dtype=e4)], [scales(4, 1, 256, 2)], scales(10, 1, 2), ends)
    named = {"dequant_mode": 2, "quant_mode": 2, "quant_dtype": 24}
    named |= {"weight_scale_dtype": E8M0, "x_scale_dtype": E8M0}
    yield "npu_grouped_matmul_swiglu_quant_v2", (t(10, 64, dtype=e4), *fused), named
    added = (t(5, 160, dtype=BF16), t(5, 160, dtype=BF16), t(160, dtype=BF16))
    for chosen in ({}, {"dst_type": 292}, {"dst_type": 292, "scale_alg": 1}):
        yield "npu_add_rms_norm_dynamic_mx_quant", added, chosen
    pairs = (t(5, 2, 3, 64, dtype=BF16), t(5, 1, 1, 64, dtype=BF16), t(5, 1, 1, 64, dtype=BF16))
    yield "npu_interleave_rope", pairs, {}
    turn = (t(5, 1, 2, 64, dtype=BF16), t(5, 1, 1, 64, dtype=BF16), t(5, 1, 1, 64, dtype=BF16))
    yield "npu_rotary_mul", (*turn, "interleave"), {}
    update = (t(10, 64, dtype=BF16), ints([[1], [9]]), t(2, 64, dtype=BF16))
    yield "npu_scatter_nd_update_", update, {}


CALLS = list(calls())


@pytest.mark.parametrize(
    ("name", "args", "kwargs"), CALLS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(CALLS)]
)
def test_shapes_and_dtypes_are_the_vendors(name, args, kwargs):
    op = getattr(torch.ops.npu, name).default
    torch.library.opcheck(op, args, kwargs, test_utils="test_faketensor")
    # test_schema multiplies its inputs to compare them, which torch cannot do in fp8.
    tensors = torch.utils._pytree.tree_leaves((args, kwargs))
    if not any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 for x in tensors):
        torch.library.opcheck(op, args, kwargs, test_utils="test_schema")


@pytest.mark.parametrize("acl_format", [2, 29])
def test_a_private_format_is_a_copy_in_plain_order(acl_format):
    """FRACTAL_NZ says how bytes lie; what a tensor holds, and its shape, are as they were."""
    weight = t(2, 64, 32, dtype=torch.int8)
    cast = torch_npu.npu_format_cast(weight, acl_format)
    assert cast.data_ptr() != weight.data_ptr()
    assert torch.equal(cast.cpu(), weight.cpu())
    assert int(torch_npu.get_npu_format(cast)) == acl_format


def test_tiles_are_refused_where_the_vendor_takes_none():
    x, weight = t(5, 64, dtype=torch.int8), t(64, 32, dtype=torch.int8)
    tiles = torch_npu.npu_format_cast(weight, 29)
    product = {"pertoken_scale": t(5), "output_dtype": 15}
    got = torch_npu.npu_quant_matmul(x, tiles, t(32), **product)
    assert torch.equal(got.cpu(), torch_npu.npu_quant_matmul(x, weight, t(32), **product).cpu())
    square = torch_npu.npu_format_cast(t(64, 64, dtype=torch.int8), 29)
    with pytest.raises(RuntimeError, match="must lie as it was cast"):
        torch_npu.npu_quant_matmul(x, square.T, t(64), **product)
    gamma = torch_npu.npu_format_cast(t(64, 64), 29)[0]
    with pytest.raises(RuntimeError, match="npu_rms_norm: an argument is in FRACTAL_NZ"):
        torch_npu.npu_rms_norm(t(5, 64), gamma)


def test_a_wrong_shape_is_noticed():
    """opcheck can fail: the vendor's Meta says bf16 rows, a stand-in with fp32 ones is refused."""
    from v4_ascend.emulation.device import on_cpu

    library = torch.library.Library("npu", "IMPL", "PrivateUse1")
    wrong = on_cpu(lambda input, dim=-1: input[:, :4].float(), "npu::npu_swiglu")
    library.impl("npu_swiglu", wrong, allow_override=True)
    with pytest.raises(Exception, match="Dtypes"):
        torch.library.opcheck(
            torch.ops.npu.npu_swiglu.default, (t(2, 8, dtype=BF16),), test_utils="test_faketensor"
        )
    library._destroy()
