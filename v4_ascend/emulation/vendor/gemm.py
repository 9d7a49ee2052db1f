"""Matrix products: batched, quantised, and grouped by expert.

Sources: op-plugin docs of each npu_*; vllm-ascend grouped_matmul_swiglu_quant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor import formats
from v4_ascend.emulation.vendor.norm import HALVES, swiglu

COUNTS, SUMS = 1, 0
ND, FRACTAL_NZ = 2, 29
MAX_WEIGHT_DIM = 65536
OUTPUTS = {
    formats.SCALAR_BF16: torch.bfloat16,
    formats.SCALAR_FP16: torch.float16,
    formats.SCALAR_FP32: torch.float32,
}


def _groups(check: Checks, group_list: torch.Tensor, kind: int, n: int, rows: int) -> list[slice]:
    """The rows of each expert."""
    check.dtype(torch.int64, group_list=group_list)
    check.shape(n, group_list=group_list)
    check.one_of((SUMS, COUNTS), group_list_type=kind)
    ends = (group_list.cumsum(0) if kind == COUNTS else group_list).tolist()
    rising = all(a <= b for a, b in zip([0, *ends], ends, strict=False))
    check.need(rising, "group_list", group_list.tolist(), "no expert has fewer than 0 rows")
    check.need(ends[-1] <= rows, "group_list's total", ends[-1], f"x has {rows} rows")
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _only(check: Checks, name: str, tensors: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
    """The tensor of a list that must hold one, or None where there is no list."""
    if not tensors:
        return None
    check.need(len(tensors) == 1, f"len({name})", len(tensors), "one tensor for all experts")
    return tensors[0]


def _dense(
    check: Checks,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MX operands as fp32: x [m, k], weight [e, k, n] with scales [m, k/64, 2], [e, k/64, n, 2]."""
    check.given(per_token_scale=x_scale, scale=scale)
    assert x_scale is not None
    assert scale is not None
    m, k = x.shape
    e, _, n = weight.shape
    steps = -(-k // (2 * formats.MX_GROUP))
    check.dtype(torch.uint8, formats.E8M0, per_token_scale=x_scale, scale=scale)
    check.shape(m, steps, 2, per_token_scale=x_scale)
    check.shape(e, steps, n, 2, scale=scale)
    packed = weight.dtype in (torch.uint8, torch.int8)
    rows = weight.shape[1] * (2 if packed else 1)
    check.need(rows == k, "weight's K", rows, f"x has {k}")
    by_row = weight.transpose(1, 2)
    values = formats.from_fp4(by_row) if packed else by_row.float()
    factors = formats.mx_scales(scale.transpose(1, 2), k)
    return x.float() * formats.mx_scales(x_scale, k), (values * factors).transpose(1, 2)


@stand_in("npu::npu_format_cast")
def npu_format_cast(
    input: torch.Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    """Return a copy in plain order: no format but ND exists here."""
    check = Checks("npu_format_cast", "op-plugin npu_format_cast.md")
    check.one_of((ND, FRACTAL_NZ), acl_format=acl_format)
    return input.clone()


@stand_in("npu::npu_grouped_matmul")
def npu_grouped_matmul(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    bias: Sequence[torch.Tensor] | None = None,
    scale: Sequence[torch.Tensor] | None = None,
    offset: Sequence[torch.Tensor] | None = None,
    antiquant_scale: Sequence[torch.Tensor] | None = None,
    antiquant_offset: Sequence[torch.Tensor] | None = None,
    per_token_scale: Sequence[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    activation_input: Sequence[torch.Tensor] | None = None,
    activation_quant_scale: Sequence[torch.Tensor] | None = None,
    activation_quant_offset: Sequence[torch.Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[torch.Tensor]:
    """Multiply each expert's rows of x[0] [m, k] by its matrix of weight[0] [e, k, n].

    bf16/fp16; int8 with scale [e, n] and per_token_scale [m]; on A2 and A3 int8 by int4 (int32
    [e, k, n/8] with scale int64 [e, 1, n] and bias [e, n]); on 950 MXFP8, and MXFP8 x MXFP4
    (weight bytes [e, k/2, n], antiquant_scale). Rows of no expert are NaN.
    """
    check = Checks("npu_grouped_matmul", "op-plugin npu_grouped_matmul.md")
    check.one_of((2, 3), split_item=split_item)
    check.one_of((0,), group_type=group_type, act_type=act_type)
    check.given(group_list=group_list)
    assert group_list is not None
    rows, matrices = _only(check, "x", x), _only(check, "weight", weight)
    assert rows is not None
    assert matrices is not None
    check.need(not any((offset, antiquant_offset)), "offset", "given", "not emulated")
    packed_int4 = matrices.dtype == torch.int32
    check.need(packed_int4 or not bias, "bias", "given", "not emulated but for int4 weights")
    check.shape(None, None, **{"x[0]": rows})
    check.shape(None, None, None, **{"weight[0]": matrices})
    e, depth, n = matrices.shape
    by_row, by_column = (
        _only(check, "per_token_scale", per_token_scale),
        _only(check, "scale", scale),
    )
    antiquant = _only(check, "antiquant_scale", antiquant_scale)
    if rows.dtype in HALVES:
        check.dtype(rows.dtype, **{"weight[0]": matrices})
        check.need(depth == rows.shape[1], "weight's K", depth, f"x has {rows.shape[1]}")
        a, b, out = rows.float(), matrices.float(), rows.dtype
    elif rows.dtype == torch.int8 and packed_int4:
        check.given(output_dtype=output_dtype)
        check.one_of((15, formats.SCALAR_BF16), output_dtype=output_dtype)
        groups = _groups(check, group_list, group_list_type or 0, e, len(rows))
        only = _only(check, "bias", bias)
        return [_int8_by_int4(check, rows, matrices, by_column, by_row, only, groups)]
    elif rows.dtype == torch.int8:
        check.dtype(torch.int8, **{"weight[0]": matrices})
        check.need(depth == rows.shape[1], "weight's K", depth, f"x has {rows.shape[1]}")
        check.given(scale=by_column, per_token_scale=by_row, output_dtype=output_dtype)
        assert by_column is not None
        assert by_row is not None
        check.shape(e, n, scale=by_column)
        check.shape(len(rows), per_token_scale=by_row)
        check.dtype(torch.float32, torch.bfloat16, scale=by_column)
        check.dtype(torch.float32, per_token_scale=by_row)
        a = rows.float() * by_row.unsqueeze(-1)
        b, out = matrices.float() * by_column.float().unsqueeze(1), torch.bfloat16
    else:
        check.one_of(("950",), **{"the chip, for fp8 x": running_on().generation})
        check.dtype(formats.FP8, **{"x[0]": rows})
        fp4 = matrices.dtype in (torch.uint8, torch.int8)
        if fp4:
            check.one_of((formats.ACL_FP4,), weight_dtype=weight_dtype)
        else:
            check.dtype(formats.FP8, **{"weight[0]": matrices})
        check.one_of((formats.ACL_E8M0, 44), per_token_scale_dtype=per_token_scale_dtype)
        check.given(output_dtype=output_dtype)
        a, b = _dense(check, rows, by_row, matrices, antiquant if fp4 else by_column)
        out = torch.bfloat16
    if output_dtype is not None:
        check.one_of(tuple(OUTPUTS), output_dtype=output_dtype)
        out = OUTPUTS[output_dtype]
    y = torch.full((len(rows), n), float("nan"), dtype=out)
    for i, mine in enumerate(_groups(check, group_list, group_list_type or 0, e, len(rows))):
        y[mine] = (a[mine] @ b[i]).to(out)
    return [y]


def _int8_by_int4(
    check: Checks,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: list[slice],
) -> torch.Tensor:
    """Multiply by halves of int8, as int4 hardware does: 16 high + (low - 8), the 8 in the bias."""
    check.one_of(("a2", "a3"), **{"the chip, for int4 weights": running_on().generation})
    check.given(scale=scale, per_token_scale=x_scale, bias=bias)
    assert scale is not None
    assert x_scale is not None
    assert bias is not None
    e, depth, words = weight.shape
    n = 8 * words
    check.need(depth == x.shape[1], "weight's K", depth, f"x has {x.shape[1]}")
    check.contiguous(**{"weight[0]": weight})
    check.dtype(torch.int64, scale=scale)
    check.shape(e, 1, n, scale=scale)
    check.dtype(torch.float32, per_token_scale=x_scale, bias=bias)
    check.shape(len(x), per_token_scale=x_scale)
    check.shape(e, n, bias=bias)
    factor = (scale & 0xFFFFFFFF).to(torch.int64).numpy().astype("uint32").view("float32")
    to_top = torch.arange(28, -1, -4, dtype=torch.int32)  # of 32 bits: shifted back, signed
    high = (x >> 4).float()
    low = (x & 15).float() - 8
    y = torch.full((len(x), n), float("nan"), dtype=torch.bfloat16)
    for i, mine in enumerate(groups):
        if mine.start == mine.stop:
            continue
        values = ((weight[i].unsqueeze(-1) << to_top) >> 28).flatten(-2).float()
        sums = 16 * (high[mine] @ values) + low[mine] @ values
        wide = sums * torch.from_numpy(factor[i, 0]) + bias[i]
        y[mine] = (wide * x_scale[mine].unsqueeze(-1)).bfloat16()
    return y


@stand_in("_C_ascend::grouped_matmul_swiglu_quant", ("a2", "a3"))
def grouped_matmul_swiglu_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grouped int8 product, limited swiglu, int8 again: [m, n/2], factors [m], and nothing.

    Shapes: x [m, k] int8, weight [e, k, n] int8, weight_scale [e, n], x_scale [m] fp32,
    group_list [e] cumulative. Rows of no expert are 0 with factor NaN.
    """
    check = Checks("grouped_matmul_swiglu_quant", "vllm-ascend grouped_matmul_swiglu_quant")
    return (
        *_swiglu_quant(check, x, weight, weight_scale, x_scale, group_list, SUMS, swiglu_limit),
        torch.empty(()),
    )


@stand_in("_C_ascend::grouped_matmul_swiglu_quant_v2", ("a2", "a3"))
def grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    smooth_scale: torch.Tensor | None,
    weight_assist_matrix: Sequence[torch.Tensor] | None,
    bias: torch.Tensor | None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 0,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 0,
    transpose_weight: bool = False,
    group_list_type: int = 0,
    tuning_config: Sequence[int] = (),
    swiglu_limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `grouped_matmul_swiglu_quant` with lists and both kinds of group_list; int8 only here."""
    check = Checks("grouped_matmul_swiglu_quant_v2", "vllm-ascend grouped_matmul_swiglu_quant_v2")
    check.one_of((0,), dequant_mode=dequant_mode, quant_mode=quant_mode)
    others = smooth_scale is None and bias is None and not weight_assist_matrix
    check.need(others, "smooth_scale, bias, assist", "given", "int4 weights are not emulated")
    matrix, scale = _only(check, "weight", weight), _only(check, "weight_scale", weight_scale)
    assert matrix is not None
    assert scale is not None
    matrix = matrix.transpose(1, 2) if transpose_weight else matrix
    return _swiglu_quant(
        check, x, matrix, scale, x_scale, group_list, group_list_type, swiglu_limit
    )


def _swiglu_quant(
    check: Checks,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    group_list_type: int,
    swiglu_limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    check.dtype(torch.int8, x=x, weight=weight)
    check.shape(None, None, x=x)
    check.shape(None, x.shape[1], None, weight=weight)
    e, _, n = weight.shape
    check.shape(e, n, weight_scale=weight_scale)
    check.dtype(torch.float32, torch.bfloat16, weight_scale=weight_scale)
    check.shape(len(x), x_scale=x_scale)
    check.dtype(torch.float32, x_scale=x_scale)
    values = torch.zeros(len(x), n // 2, dtype=torch.int8)
    factors = torch.full((len(x),), float("nan"))
    for i, mine in enumerate(_groups(check, group_list, group_list_type, e, len(x))):
        product = (x[mine].float() @ weight[i].float()) * weight_scale[i].float()
        act = swiglu(product * x_scale[mine].unsqueeze(-1), swiglu_limit)
        values[mine], factors[mine] = formats.per_token(act, torch.int8)
    return values, factors


@stand_in("npu::npu_quant_matmul")
def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply x1 [m, k] by x2 [k, n]: int8, and on 950 fp8 with MX or 128x128 block scales."""
    check = Checks("npu_quant_matmul", "op-plugin npu_quant_matmul.md")
    check.shape(None, None, x1=x1)
    m, k = x1.shape
    check.shape(k, None, x2=x2)
    n = x2.shape[1]
    largest = max(k, n)
    check.need(
        largest < MAX_WEIGHT_DIM, "x2.shape", list(x2.shape), f"below {MAX_WEIGHT_DIM}; split it"
    )
    others = offset is None and bias is None and y_scale is None
    check.need(others, "offset, bias or y_scale", "given", "not emulated")
    check.given(pertoken_scale=pertoken_scale, output_dtype=output_dtype)
    assert pertoken_scale is not None
    assert output_dtype is not None
    check.one_of(tuple(OUTPUTS), output_dtype=output_dtype)
    if x1.dtype == torch.int8:
        check.dtype(torch.int8, x2=x2)
        check.dtype(torch.float32, torch.bfloat16, scale=scale)
        check.dtype(torch.float32, pertoken_scale=pertoken_scale)
        check.shape(n, scale=scale)
        check.shape(m, pertoken_scale=pertoken_scale)
        y = (x1.float() @ x2.float()) * scale.float() * pertoken_scale.unsqueeze(-1)
        return y.to(OUTPUTS[output_dtype])
    check.one_of(("950",), **{"the chip, for fp8 x1": running_on().generation})
    check.dtype(formats.FP8, x1=x1, x2=x2)
    check.given(group_sizes=group_sizes)
    sizes = list(group_sizes or ())
    check.one_of(([1, 1, 32], [0, 0, 32], [1, 128, 128]), group_sizes=sizes)
    if sizes[-1] == formats.MX_GROUP:
        check.shape(-(-k // 64), n, 2, scale=scale)
        a, b = _dense(check, x1, pertoken_scale, x2.unsqueeze(0), scale.unsqueeze(0))
        return (a @ b[0]).to(OUTPUTS[output_dtype])
    check.dtype(torch.float32, scale=scale, pertoken_scale=pertoken_scale)
    check.shape(-(-k // 128), -(-n // 128), scale=scale)
    check.shape(m, -(-k // 128), pertoken_scale=pertoken_scale)
    a = x1.float() * pertoken_scale.repeat_interleave(128, 1)[:, :k]
    wide = scale.repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
    return (a @ (x2.float() * wide)).to(OUTPUTS[output_dtype])


@stand_in("npu::npu_transpose_batchmatmul")
def npu_transpose_batchmatmul(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> torch.Tensor:
    """Return ``perm_y(perm_x1(input) @ perm_x2(weight))``, dtype of input."""
    check = Checks("npu_transpose_batchmatmul", "op-plugin npu_transpose_batchmatmul.md")
    check.dtype(*HALVES, torch.float32, input=input)
    check.dtype(input.dtype, weight=weight)
    check.need(bias is None and scale is None, "bias or scale", "given", "not emulated")
    check.one_of((1,), batch_split_factor=batch_split_factor)
    identity = [0, 1, 2]
    perms = [list(p) if p else identity for p in (perm_x1, perm_x2, perm_y)]
    check.one_of((identity, [1, 0, 2]), perm_x1=perms[0])
    check.one_of((identity,), perm_x2=perms[1])
    check.one_of(([1, 0, 2],), perm_y=perms[2] if perm_y else [1, 0, 2])
    a, b = input.permute(perms[0]), weight.permute(perms[1])
    check.shape(a.shape[0], a.shape[2], None, **{"weight, permuted": b})
    y = (a.float() @ b.float()).to(input.dtype)
    return y.permute(1, 0, 2).contiguous()
