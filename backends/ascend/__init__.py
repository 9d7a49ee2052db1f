"""Ascend: vllm-ascend's V4 operators, torch_npu's own, and plain torch on the npu device.

Importing it needs no torch_npu: which kernel would run can be asked on any machine.
"""

from __future__ import annotations

from v4_ascend.backends.ascend import activation as activation
from v4_ascend.backends.ascend import attention as attention
from v4_ascend.backends.ascend import batched as batched
from v4_ascend.backends.ascend import cache as cache
from v4_ascend.backends.ascend import compressor as compressor
from v4_ascend.backends.ascend import custom_ops, soc
from v4_ascend.backends.ascend import expert_layer as expert_layer
from v4_ascend.backends.ascend import gate as gate
from v4_ascend.backends.ascend import gemm as gemm
from v4_ascend.backends.ascend import hyper_connection as hyper_connection
from v4_ascend.backends.ascend import indexer as indexer
from v4_ascend.backends.ascend import int8 as int8
from v4_ascend.backends.ascend import mc2 as mc2  # before moe: tried before it
from v4_ascend.backends.ascend import moe as moe
from v4_ascend.backends.ascend import new_rows as new_rows
from v4_ascend.backends.ascend import norm_rope as norm_rope
from v4_ascend.backends.ascend import plain as plain
from v4_ascend.backends.ascend import triton_kernels as triton_kernels
from v4_ascend.backends.backend import Backend, Proof
from v4_ascend.supernode.cache import MIN_PAGE_ROWS


def _proof() -> Proof:
    return "emulated call" if custom_ops.is_emulated() else "executed"


def _records(dtype: str, quant_sim: bool) -> tuple[str, str]:
    """950 keeps fp8 rows, A2 and A3 bf16 rows and int8 keys; fp32 streams keep fp32."""
    if dtype != "bf16":
        return dtype, dtype
    return ("fp8_640", "fp8_132") if soc.current_chip() == soc.A5 else ("bf16", "int8")


def _device() -> str:
    custom_ops.torch_npu()  # torch knows no npu before
    return "npu"


ASCEND = Backend(
    name="ascend",
    device=_device,
    why_unavailable=custom_ops.why_no_npu,
    proof=_proof,
    chips=soc.CHIPS,
    use_chip=soc.use_chip,
    records=_records,
    min_page_rows=MIN_PAGE_ROWS["ascend"],
)

soc.order(soc.A5, only_installed=False)

__all__ = ["ASCEND"]
