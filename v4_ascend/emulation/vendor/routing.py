"""Rows of tokens sorted by expert, and back.

Sources: op-plugin npu_moe_init_routing_v2.md, npu_moe_token_unpermute.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor import formats
from v4_ascend.emulation.vendor.norm import HALVES

NO_QUANT, INT8, MXFP8 = -1, 1, 3
SUMS, COUNTS = 0, 1
GATHER, SCATTER = 0, 1


@stand_in("npu::npu_moe_init_routing_v2")
def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each token once per chosen expert in range, sorted by expert, then by token.

    Shapes:
        x, expert_idx  [T, H], [T, K] int32
        return  rows [active_num, H]; [T K] int32: row of each (token, choice), -1 if out of
                range (row_idx_type 0), or (token, choice) of each row (1); tokens per expert
                in range, int64, counted (1) or summed (0); factors. Rows of nobody are NaN.
    """
    check = Checks("npu_moe_init_routing_v2", "op-plugin npu_moe_init_routing_v2.md")
    check.dtype(*HALVES, torch.float32, x=x)
    check.dtype(torch.int32, expert_idx=expert_idx)
    check.shape(None, None, x=x)
    check.shape(len(x), None, expert_idx=expert_idx)
    check.one_of((0,), drop_pad_mode=drop_pad_mode)
    check.one_of((True,), expert_tokens_num_flag=expert_tokens_num_flag)
    check.one_of((SUMS, COUNTS), expert_tokens_num_type=expert_tokens_num_type)
    check.one_of((GATHER, SCATTER), row_idx_type=row_idx_type)
    modes = (NO_QUANT, INT8, MXFP8) if running_on().generation == "950" else (NO_QUANT, INT8)
    check.one_of(modes, quant_mode=quant_mode)
    check.need(scale is None and offset is None, "scale or offset", "given", "not emulated")
    check.need(expert_num > 0, "expert_num", expert_num, "it must be given")
    first, last = list(active_expert_range) or [0, expert_num]
    inside = 0 <= first < last <= expert_num
    check.need(inside, "active_expert_range", [first, last], f"within 0 to {expert_num}")
    n = expert_idx.numel()
    check.need(active_num in (-1, 0) or active_num <= n, "active_num", active_num, f"at most {n}")
    flat = expert_idx.flatten().long()
    check.need(
        bool(((flat >= 0) & (flat < expert_num)).all()),
        "expert_idx",
        "outside",
        f"0 to {expert_num - 1}",
    )

    mine = (flat >= first) & (flat < last)
    order = torch.sort(torch.where(mine, flat, expert_num), stable=True).indices[: int(mine.sum())]
    rows = n if active_num in (-1, 0) else active_num
    order = order[:rows]
    taken = torch.full((rows, x.shape[1]), float("nan"), dtype=x.dtype)
    taken[: len(order)] = x[order // expert_idx.shape[1]]
    index = torch.full((n,), -1, dtype=torch.int32)
    if row_idx_type == GATHER:
        index[order] = torch.arange(len(order), dtype=torch.int32)
    else:
        index[: len(order)] = order.int()
    counts = torch.bincount(flat[mine] - first, minlength=last - first)
    tokens = counts.cumsum(0) if expert_tokens_num_type == SUMS else counts
    if quant_mode == NO_QUANT:
        return taken, index, tokens, torch.full((rows,), float("nan"))
    if quant_mode == INT8:
        values, factors = formats.per_token(taken.nan_to_num(0.0), torch.int8)
        return values, index, tokens, factors
    values, scales = formats.mx_quant(taken.nan_to_num(0.0), fp4=False)
    return values, index, tokens, scales.flatten(-2).view(formats.E8M0)


@stand_in("npu::npu_moe_token_unpermute")
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return, per token, the sum of its rows weighted by probs [T, K]; dtype of the rows."""
    check = Checks("npu_moe_token_unpermute", "op-plugin npu_moe_token_unpermute.md")
    check.dtype(*HALVES, torch.float32, permuted_tokens=permuted_tokens)
    check.shape(None, None, permuted_tokens=permuted_tokens)
    check.dtype(torch.int32, sorted_indices=sorted_indices)
    check.one_of((False,), padded_mode=padded_mode)
    choices = 1 if probs is None else probs.shape[1]
    n = sorted_indices.numel()
    check.need(choices <= 512, "probs.shape[1]", choices, "at most 512")
    if probs is not None:
        check.shape(n // choices, choices, probs=probs)
        check.dtype(*HALVES, torch.float32, probs=probs)
    rows = len(permuted_tokens)
    inside = bool(((sorted_indices >= 0) & (sorted_indices < rows)).all())
    check.need(inside, "sorted_indices", "outside", f"0 to {rows - 1}")
    taken = permuted_tokens[sorted_indices.long()].float().unflatten(0, (-1, choices))
    if probs is not None:
        taken = taken * probs.float().unsqueeze(-1)
    return taken.sum(1).to(permuted_tokens.dtype)
