"""Products of one matrix per group of heads, with the group in the middle of the input.

Sources: op-plugin docs of each npu_*.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor import formats
from v4_ascend.emulation.vendor.gemm import OUTPUTS
from v4_ascend.emulation.vendor.norm import HALVES

KEPT, SWAPPED, OF_ROWS = [0, 1, 2], [0, 2, 1], [1, 0, 2]
MX_GROUPS = tuple([m, n, formats.MX_GROUP] for m in (0, 1) for n in (0, 1))
MAX_SIDE = 65536  # on A2 and A3
CHANNELS = 512, 128  # k and n of weights with a factor per channel


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
    on_950 = running_on().generation == "950"
    check.one_of((identity, [1, 0, 2]), perm_x1=perms[0])
    check.one_of((identity, SWAPPED) if on_950 else (identity,), perm_x2=perms[1])
    check.one_of(([1, 0, 2],), perm_y=perms[2] if perm_y else [1, 0, 2])
    check.shape(None, None, None, input=input, weight=weight)
    a, b = input.permute(perms[0]), weight.permute(perms[1])
    check.shape(a.shape[0], a.shape[2], None, **{"weight, permuted": b})
    if not on_950:
        _check_old_limits(check, a, b, is_swapped=perms[0] != identity)
    y = (a.float() @ b.float()).to(input.dtype)
    return y.permute(1, 0, 2).contiguous()


def _check_old_limits(check: Checks, a: torch.Tensor, b: torch.Tensor, is_swapped: bool) -> None:
    """Refuse what A2 and A3 do not take of groups, channels and outputs."""
    (groups, _, k), n = a.shape, b.shape[2]
    limit = f"sides are below {MAX_SIDE}, k and n multiples of 16"
    fits = max(groups, k, n) < MAX_SIDE and k % 16 == 0 and n % 16 == 0
    check.need(fits, "(groups, k, n)", (groups, k, n), limit)
    together = groups * k
    limit = f"swapped by perm_x1 they are below {MAX_SIDE}"
    check.need(together < MAX_SIDE or not is_swapped, "groups * k", together, limit)


@stand_in("npu::npu_transpose_quant_batchmatmul", ("950",))
def npu_transpose_quant_batchmatmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    dtype: int,
    *,
    bias: torch.Tensor | None = None,
    x1_scale: torch.Tensor | None = None,
    x2_scale: torch.Tensor | None = None,
    group_sizes: Sequence[int] | None = None,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
) -> torch.Tensor:
    """Multiply each group's rows of e4m3 x1 [m, b, k] by its matrix of x2, to [m, b, n].

    Without `group_sizes` x1_scale [m] and x2_scale [n] are fp32; with them, MX: e8m0
    [m, b, k/64, 2], and [b, k/64, n, 2] for x2 [b, k, n] or [b, n, k/64, 2] for x2 [b, n, k].
    """
    check = Checks(
        "npu_transpose_quant_batchmatmul", "op-plugin npu_transpose_quant_batchmatmul.md"
    )
    check.dtype(formats.FP8, x1=x1, x2=x2)
    check.one_of((formats.SCALAR_BF16, formats.SCALAR_FP16), dtype=dtype)
    check.need(bias is None, "bias", "given", "it must be None")
    check.one_of((1,), batch_split_factor=batch_split_factor)
    check.one_of((None, formats.SCALAR_E4M3, formats.ACL_E4M3), x1_dtype=x1_dtype)
    check.one_of((None, formats.SCALAR_E4M3, formats.ACL_E4M3), x2_dtype=x2_dtype)
    check.one_of((OF_ROWS,), perm_x1=list(perm_x1 or OF_ROWS), perm_y=list(perm_y or OF_ROWS))
    order = list(perm_x2 or KEPT)
    check.one_of((KEPT, SWAPPED) if group_sizes else (KEPT,), perm_x2=order)
    check.shape(None, None, None, x1=x1, x2=x2)
    check.given(x1_scale=x1_scale, x2_scale=x2_scale)
    assert x1_scale is not None
    assert x2_scale is not None
    (m, b, k), n = x1.shape, x2.permute(order).shape[2]
    check.shape(b, k, n, **{"x2, permuted": x2.permute(order)})
    weight = x2.permute(order).float()
    if group_sizes:
        check.one_of(MX_GROUPS, group_sizes=list(group_sizes))
        check.need(k % 64 == 0, "k", k, "it must be a multiple of 64")
        check.dtype(formats.E8M0, x1_scale=x1_scale, x2_scale=x2_scale)
        check.shape(m, b, k // 64, 2, x1_scale=x1_scale)
        by_column = order == SWAPPED
        steps = (n, k // 64) if by_column else (k // 64, n)
        check.shape(b, *steps, 2, x2_scale=x2_scale)
        factors = x2_scale if by_column else x2_scale.transpose(1, 2)
        weight = weight * formats.mx_scales(factors, k).transpose(1, 2)
        rows = x1.float() * formats.mx_scales(x1_scale, k)
        y = rows.transpose(0, 1) @ weight
    else:
        check.one_of((CHANNELS,), **{"(k, n)": (k, n)})
        check.dtype(torch.float32, x1_scale=x1_scale, x2_scale=x2_scale)
        check.shape(m, x1_scale=x1_scale)
        check.shape(n, x2_scale=x2_scale)
        y = (x1.float().transpose(0, 1) @ weight) * x2_scale * x1_scale.unsqueeze(-1)
    return y.transpose(0, 1).contiguous().to(OUTPUTS[dtype])
