"""A whole expert layer in one operator: tokens to their experts' ranks, both products, and back.

Source: vllm-ascend csrc/mc2/dispatch_ffn_combine (torch adapter, op_host, epilogues) and its
two-rank test of the bf16 variant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.collectives import communicator
from v4_ascend.emulation.stand_in import stand_in
from v4_ascend.emulation.vendor import formats
from v4_ascend.emulation.vendor.mc2 import exchanged
from v4_ascend.emulation.vendor.mc2_checks import DEFAULT_BUFFSIZE
from v4_ascend.emulation.vendor.norm import HALVES, swiglu

BUFFER_COPIES, BUFFER_SPARE = 3, 10 << 20  # of a rank's rows; bytes beside them


@dataclass(frozen=True)
class _Weights:
    """Both products of this rank's experts; `scales` are there for int8."""

    w13: torch.Tensor
    w2: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None


@stand_in("_C_ascend::dispatch_ffn_combine", ("a3",))
def dispatch_ffn_combine(
    x: torch.Tensor,
    weight1: Sequence[torch.Tensor],
    weight2: Sequence[torch.Tensor],
    expert_idx: torch.Tensor,
    scale1: Sequence[torch.Tensor],
    scale2: Sequence[torch.Tensor],
    bias1: Sequence[torch.Tensor],
    bias2: Sequence[torch.Tensor],
    probs: torch.Tensor,
    group: str,
    max_output_size: int,
    out: torch.Tensor,
    expert_token_nums: torch.Tensor,
    x_active_mask: torch.Tensor | None = None,
    swiglu_limit: float = 1000000.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write each token's experts' sum into `out`, and this rank's rows per expert.

    Shapes:
        x, out             [M, H]  bf16 or fp16; rows of inactive tokens come out NaN
        weight1, weight2   one [E, H, 2 I], [E, I, H], or E of [H, 2 I], [I, H]: as x, or int8
        scale1, scale2     as the weights, [E, 2 I], [E, H]: fp32 in the low halves of int64
        expert_idx, probs  [M, K] int32, fp32; E times the ranks is nobody
        expert_token_nums  E of int32
        x_active_mask      [M] bool
    With int8 rows are quantised by token, before each product.
    """
    check = Checks("dispatch_ffn_combine", "vllm-ascend csrc/mc2/dispatch_ffn_combine")
    check.dtype(*HALVES, x=x)
    check.shape(None, None, x=x)
    tokens, dim = x.shape
    check.dtype(torch.int32, expert_idx=expert_idx)
    check.shape(tokens, None, expert_idx=expert_idx)
    check.dtype(torch.float32, probs=probs)
    check.shape(*expert_idx.shape, probs=probs)
    weights = _weights(check, x, weight1, weight2, scale1, scale2)
    local = len(weights.w13)
    check.dtype(x.dtype, out=out)
    check.shape(tokens, dim, out=out)
    check.dtype(torch.int32, expert_token_nums=expert_token_nums)
    check.need(
        expert_token_nums.numel() == local, "len(expert_token_nums)", expert_token_nums.numel(),
        f"this rank has {local} experts",
    )  # fmt: skip
    check.dtype(torch.bool, x_active_mask=x_active_mask)
    check.shape(tokens, x_active_mask=x_active_mask)
    ranks = communicator(group)
    check.need(ranks is not None, "group", repr(group), "it must name an HCCL communicator")
    if ranks is None:
        raise AssertionError("refused above")
    nobody = local * ranks.size()
    known = bool(((expert_idx >= 0) & (expert_idx <= nobody)).all())
    check.need(known, "expert_idx", "outside", f"0 to {nobody}, which is nobody")
    has = int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_BUFFSIZE))
    need = tokens * expert_idx.shape[1] * dim * BUFFER_COPIES + BUFFER_SPARE
    check.need(need <= has << 20, "HCCL_BUFFSIZE", has, f"at least {-(-need >> 20)} MB")

    active = torch.ones(tokens, dtype=torch.bool) if x_active_mask is None else x_active_mask
    token, slot = ((expert_idx < nobody) & active.unsqueeze(1)).nonzero(as_tuple=True)
    wanted = expert_idx[token, slot].long()
    order = wanted.sort(stable=True).indices
    token, slot = token[order], slot[order]
    sent = torch.bincount(wanted, minlength=nobody).view(ranks.size(), local)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=ranks)
    leaving, arriving = sent.sum(1).tolist(), got.sum(1).tolist()
    check.need(
        sum(arriving) <= max_output_size, "max_output_size", max_output_size,
        f"{sum(arriving)} rows arrive",
    )  # fmt: skip
    expert = torch.arange(local).repeat(ranks.size()).repeat_interleave(got.flatten())
    done = exchanged(
        ranks, _by_experts(ranks, x[token], leaving, arriving, expert, weights, swiglu_limit),
        arriving, leaving,
    )  # fmt: skip
    total = torch.zeros(tokens, dim)
    total.index_add_(0, token, done * probs[token, slot].unsqueeze(1))
    out.copy_(total.masked_fill(~active.unsqueeze(1), torch.nan))
    expert_token_nums.copy_(got.sum(0).view(expert_token_nums.shape))
    return out, expert_token_nums


def _by_experts(
    ranks: dist.ProcessGroup,
    rows: torch.Tensor,
    leaving: list[int],
    arriving: list[int],
    expert: torch.Tensor,
    weights: _Weights,
    limit: float,
) -> torch.Tensor:
    """Send rows, run those that arrive through their experts, and return them in fp32."""
    if weights.scales is None:
        here = exchanged(ranks, rows, leaving, arriving).float()
        factors = None
    else:
        values, by_row = formats.per_token(rows, torch.int8)
        here = exchanged(ranks, values, leaving, arriving).float()
        factors = exchanged(ranks, by_row.unsqueeze(1), leaving, arriving)
    y = torch.empty(len(here), weights.w2.shape[2])
    for e in expert.unique().tolist():
        mine = expert == e
        product = here[mine] @ weights.w13[e].float()
        if weights.scales is None or factors is None:
            y[mine] = swiglu(product, limit) @ weights.w2[e].float()
            continue
        act = swiglu(product * weights.scales[0][e] * factors[mine], limit)
        values, by_row = formats.per_token(act, torch.int8)
        y[mine] = (values.float() @ weights.w2[e].float()) * weights.scales[1][e]
        y[mine] *= by_row.unsqueeze(1)
    return y


def _weights(
    check: Checks,
    x: torch.Tensor,
    weight1: Sequence[torch.Tensor],
    weight2: Sequence[torch.Tensor],
    scale1: Sequence[torch.Tensor],
    scale2: Sequence[torch.Tensor],
) -> _Weights:
    w13, w2 = _stacked(check, "weight1", weight1, 3), _stacked(check, "weight2", weight2, 3)
    check.dtype(torch.int8, x.dtype, weight1=w13)  # int4, as int32, is not emulated
    check.dtype(w13.dtype, weight2=w2)
    check.shape(None, x.shape[1], None, weight1=w13)
    local, dim, n = w13.shape
    check.need(n % 2 == 0, "N", n, "it must be even: a gate and a value each")
    check.shape(local, n // 2, dim, weight2=w2)
    if w13.dtype != torch.int8:
        return _Weights(w13, w2, None)
    scales = [_stacked(check, f"scale{i}", s, 2) for i, s in enumerate((scale1, scale2), 1)]
    check.dtype(torch.int64, scale1=scales[0], scale2=scales[1])
    check.shape(local, n, scale1=scales[0])
    check.shape(local, dim, scale2=scales[1])
    return _Weights(w13, w2, (formats.low_words(scales[0]), formats.low_words(scales[1])))


def _stacked(check: Checks, name: str, tensors: Sequence[torch.Tensor], dims: int) -> torch.Tensor:
    """All experts' tensors: given as one with the expert first, or as one each."""
    check.need(len(tensors) > 0, f"len({name})", 0, "one tensor for all experts, or one each")
    one = tensors[0]
    if len(tensors) == 1 and one.dim() == dims:
        return one
    alike = all(t.dim() == dims - 1 and t.shape == one.shape for t in tensors)
    check.need(alike, f"{name}.shape", [list(t.shape) for t in tensors], "the same for each expert")
    return torch.stack(list(tensors))
