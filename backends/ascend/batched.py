"""One matrix per group of heads, with the group in the middle of the input: `wo_a`."""

from __future__ import annotations

import torch

from v4_ascend.backends.ascend.custom_ops import torch_npu
from v4_ascend.backends.ascend.soc import A5, current_chip
from v4_ascend.ops import heads_gemm

KEPT, SWAPPED, ROWS_FIRST = (0, 1, 2), (0, 2, 1), (1, 0, 2)
MAX_SIDE = 65536  # on A2 and A3: a side stays below it, and so do the groups' channels together
STEP = 16


def _why_not(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, must be bf16"
    if current_chip() == A5:
        return None
    _, n, k = weight.shape
    if n % STEP or k % STEP:
        return f"the matrices are {[n, k]}, must be multiples of {STEP}"
    if max(weight.shape) >= MAX_SIDE:
        return f"the weight is {list(weight.shape)}, must be below {MAX_SIDE}"
    return None


@heads_gemm.kernel("ascend", provider="torch_npu", why_not=_why_not)
def transpose_batchmatmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply where both lie, without a copy in another order.

    A2 and A3 know no transposed weight, but take one whose strides are; and of Pro's 16 groups
    they swap nothing, as their channels are 65536: there the strides say it too.
    """
    if not x.shape[0]:
        return torch.empty(0, *weight.shape[:2], dtype=x.dtype, device=x.device)
    is_new = current_chip() == A5
    swaps = is_new or x.shape[1] * x.shape[2] < MAX_SIDE
    y: torch.Tensor = torch_npu().npu_transpose_batchmatmul(
        x if swaps else x.transpose(0, 1),
        weight if is_new else weight.transpose(1, 2),
        perm_x1=ROWS_FIRST if swaps else KEPT,
        perm_x2=SWAPPED if is_new else KEPT,
        perm_y=ROWS_FIRST,
    )
    return y
