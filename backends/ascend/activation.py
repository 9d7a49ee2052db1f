"""The experts' activation and what quantises it, in one call: FP8 rows on the 950."""

from __future__ import annotations

import torch

from v4_ascend.backends.ascend.custom_ops import c_ascend
from v4_ascend.ops import swiglu_act_quant
from v4_ascend.ops.formats import E8M0, FP8, ceil_to_e8m0
from v4_ascend.ops.gemm import ACT_GROUP

BY_GROUP = 1  # quant_mode: a factor for each 128 channels


def _why_no_fp8_rows(x: torch.Tensor, limit: float, weight: torch.Tensor | None) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, must be bf16"
    if x.shape[1] % (2 * ACT_GROUP):
        return f"two halves of {x.shape[1] // 2}, must be multiples of {ACT_GROUP}"
    return None if limit > 0 else f"limit is {limit}, of which the operator makes no limit"


@swiglu_act_quant.kernel("ascend", provider="_C_ascend", why_not=_why_no_fp8_rows)
def swiglu_group_quant(
    x: torch.Tensor, limit: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the activation in fp32; factors are powers of two, given in fp32."""
    n_rows, inter_dim = x.shape[0], x.shape[1] // 2
    if not n_rows:
        values = torch.empty(0, inter_dim, dtype=FP8, device=x.device)
        return values, torch.empty(0, inter_dim // ACT_GROUP, dtype=E8M0, device=x.device)
    values, scales, _ = c_ascend("npu_swiglu_group_quant")(
        x.contiguous(),
        weight,
        None,  # all rows are some expert's
        dst_type=FP8,
        quant_mode=BY_GROUP,
        group_size=ACT_GROUP,
        round_scale=True,
        clamp_value=limit,
    )
    return values, ceil_to_e8m0(scales)
