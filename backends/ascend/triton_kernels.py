"""Our Triton kernels through triton-ascend, for operators the vendor has no kernel for.

On A2 and A3 only: triton-ascend 3.2.0 switches the 950 off. They are interpreted in tests and
lowered to Linalg by triton-ascend's own passes; nobody has run them on an NPU.
"""

from __future__ import annotations

from typing import Any

import torch

from v4_ascend.backends.triton.limits import MODULES
from v4_ascend.backends.triton.registry import register
from v4_ascend.ops import OPS

# index_scores of fp8_132 does not lower: "strides must not be zero".
INDEX_RECORDS = ("fp32", "bf16")
OWN = ("hadamard", "swiglu", "hc_head", "index_scores", "index_topk")


def _why_no_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    *_rest: Any,
    **_named: Any,
) -> str | None:
    if record not in INDEX_RECORDS:
        return f"the record is {record}, triton-ascend lowers {' and '.join(INDEX_RECORDS)}"
    return None


for _module, _ops in MODULES.items():
    for _name, _why_not in _ops.items():
        if _name in OWN:
            _refuses = _why_no_scores if _name == "index_scores" else _why_not
            register(OPS[_name], f"triton.{_module}", _refuses, backend="ascend")
