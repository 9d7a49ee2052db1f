"""Matrix products: quantised, and grouped by expert.

Sources: op-plugin docs of each npu_*.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor import formats
from v4_ascend.emulation.vendor.norm import HALVES

COUNTS, SUMS = 1, 0
ND, FRACTAL_NZ = 2, 29
MAX_WEIGHT_DIM = 65536
OUTPUTS = {
    formats.SCALAR_BF16: torch.bfloat16,
    formats.SCALAR_FP16: torch.float16,
    formats.SCALAR_FP32: torch.float32,
}


def groups_of(check: Checks, group_list: torch.Tensor, kind: int, n: int, rows: int) -> list[slice]:
    """Return the rows of each expert."""
    check.dtype(torch.int64, group_list=group_list)
    check.shape(n, group_list=group_list)
    check.one_of((SUMS, COUNTS), group_list_type=kind)
    ends = (group_list.cumsum(0) if kind == COUNTS else group_list).tolist()
    rising = all(a <= b for a, b in zip([0, *ends], ends, strict=False))
    check.need(rising, "group_list", group_list.tolist(), "no expert has fewer than 0 rows")
    check.need(ends[-1] <= rows, "group_list's total", ends[-1], f"x has {rows} rows")
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def only(check: Checks, name: str, tensors: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
    """Return the tensor of a list that must hold one, or None where there is no list."""
    if not tensors:
        return None
    check.need(len(tensors) == 1, f"len({name})", len(tensors), "one tensor for all experts")
    return tensors[0]


def mx_operands(
    check: Checks,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return MX operands as fp32.

    x [m, k], weight [e, k, n] with scales [m, k/64, 2], [e, k/64, n, 2].
    """
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
    """Return a copy in plain order: the format is what torch_npu remembers of it."""
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

    bf16/fp16; int8 with scale [e, n] and per_token_scale [m], or without them to int32; on A2 and
    A3 int8 by int4 (int32 [e, k, n/8] with scale int64 [e, 1, n] and bias [e, n]); on 950 MXFP8,
    and MXFP8 x MXFP4 (weight bytes [e, k/2, n], antiquant_scale). Rows of no expert are NaN.
    """
    check = Checks("npu_grouped_matmul", "op-plugin npu_grouped_matmul.md")
    check.one_of((2, 3), split_item=split_item)
    check.one_of((0,), group_type=group_type, act_type=act_type)
    check.given(group_list=group_list)
    assert group_list is not None
    rows, matrices = only(check, "x", x), only(check, "weight", weight)
    assert rows is not None
    assert matrices is not None
    check.need(not any((offset, antiquant_offset)), "offset", "given", "not emulated")
    packed_int4 = matrices.dtype == torch.int32
    check.need(packed_int4 or not bias, "bias", "given", "not emulated but for int4 weights")
    check.shape(None, None, **{"x[0]": rows})
    check.shape(None, None, None, **{"weight[0]": matrices})
    e, depth, n = matrices.shape
    by_row, by_column = (
        only(check, "per_token_scale", per_token_scale),
        only(check, "scale", scale),
    )
    antiquant = only(check, "antiquant_scale", antiquant_scale)
    if rows.dtype in HALVES:
        check.dtype(rows.dtype, **{"weight[0]": matrices})
        check.need(depth == rows.shape[1], "weight's K", depth, f"x has {rows.shape[1]}")
        a, b, out = rows.float(), matrices.float(), rows.dtype
    elif rows.dtype == torch.int8 and packed_int4:
        check.given(output_dtype=output_dtype)
        check.one_of((15, formats.SCALAR_BF16), output_dtype=output_dtype)
        groups = groups_of(check, group_list, group_list_type or 0, e, len(rows))
        added = only(check, "bias", bias)
        check.given(scale=by_column, per_token_scale=by_row, bias=added)
        assert by_column is not None
        assert by_row is not None
        assert added is not None
        check.shape(e, 1, 8 * n, scale=by_column)
        factors = by_column.squeeze(1)
        return [int8_by_int4(check, rows, matrices, factors, by_row, added, groups).bfloat16()]
    elif rows.dtype == torch.int8 and output_dtype == formats.SCALAR_INT32:
        check.dtype(torch.int8, **{"weight[0]": matrices})
        check.need(depth == rows.shape[1], "weight's K", depth, f"x has {rows.shape[1]}")
        given = by_column is not None or by_row is not None
        check.need(not given, "scale or per_token_scale", "given", "int32 sums have none")
        sums = torch.zeros(len(rows), n, dtype=torch.int32)
        for i, mine in enumerate(groups_of(check, group_list, group_list_type or 0, e, len(rows))):
            sums[mine] = (rows[mine].double() @ matrices[i].double()).int()
        return [sums]
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
        a, b = mx_operands(check, rows, by_row, matrices, antiquant if fp4 else by_column)
        out = torch.bfloat16
    if output_dtype is not None:
        check.one_of(tuple(OUTPUTS), output_dtype=output_dtype)
        out = OUTPUTS[output_dtype]
    y = torch.full((len(rows), n), float("nan"), dtype=out)
    for i, mine in enumerate(groups_of(check, group_list, group_list_type or 0, e, len(rows))):
        y[mine] = (a[mine] @ b[i]).to(out)
    return [y]


def int8_by_int4(
    check: Checks,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    x_scale: torch.Tensor,
    bias: torch.Tensor,
    groups: list[slice],
) -> torch.Tensor:
    """Multiply by halves of int8, as int4 hardware does: 16 high + (low - 8), the 8 in the bias.

    Shapes: x [m, k], weight [e, k, n / 8] int32, scale [e, n] int64, bias [e, n]; return fp32.
    """
    check.one_of(("a2", "a3"), **{"the chip, for int4 weights": running_on().generation})
    e, depth, words = weight.shape
    n = 8 * words
    check.need(depth == x.shape[1], "weight's K", depth, f"x has {x.shape[1]}")
    check.contiguous(**{"weight[0]": weight})
    check.dtype(torch.int64, scale=scale)
    check.shape(e, n, scale=scale)
    check.dtype(torch.float32, per_token_scale=x_scale, bias=bias)
    check.shape(len(x), per_token_scale=x_scale)
    check.shape(e, n, bias=bias)
    factor = formats.low_words(scale)
    to_top = torch.arange(28, -1, -4, dtype=torch.int32)  # of 32 bits: shifted back, signed
    high = (x >> 4).float()
    low = (x & 15).float() - 8
    y = torch.full((len(x), n), float("nan"))
    for i, mine in enumerate(groups):
        if mine.start == mine.stop:
            continue
        values = ((weight[i].unsqueeze(-1) << to_top) >> 28).flatten(-2).float()
        sums = 16 * (high[mine] @ values) + low[mine] @ values
        y[mine] = (sums * factor[i] + bias[i]) * x_scale[mine].unsqueeze(-1)
    return y


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
        a, b = mx_operands(check, x1, pertoken_scale, x2.unsqueeze(0), scale.unsqueeze(0))
        return (a @ b[0]).to(OUTPUTS[output_dtype])
    check.dtype(torch.float32, scale=scale, pertoken_scale=pertoken_scale)
    check.shape(-(-k // 128), -(-n // 128), scale=scale)
    check.shape(m, -(-k // 128), pertoken_scale=pertoken_scale)
    a = x1.float() * pertoken_scale.repeat_interleave(128, 1)[:, :k]
    wide = scale.repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
    return (a @ (x2.float() * wide)).to(OUTPUTS[output_dtype])
