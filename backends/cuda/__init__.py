"""CUDA: our Triton kernels, and plain torch for what only moves rows or draws tokens.

Under TRITON_INTERPRET=1 the same kernels run step by step on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from v4_ascend.backends.backend import Backend, Proof
from v4_ascend.backends.cuda import kernels as kernels
from v4_ascend.backends.triton.registry import watch_compilations
from v4_ascend.errors import ConfigError


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'v4-ascend[cuda]')"
    if not _is_interpreting() and not torch.cuda.is_available():
        return (
            "torch sees no CUDA device (see nvidia-smi, CUDA_VISIBLE_DEVICES); "
            "TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
        )
    return None


def _proof() -> Proof:
    return "interpreted" if _is_interpreting() else "executed"


def _use_chip(chip: str | None) -> None:
    """Refuse a GPU other than the one planned for; kernels are compiled for what is here."""
    if chip is None or _is_interpreting() or not torch.cuda.is_available():
        return
    here = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if chip != here:
        name = torch.cuda.get_device_name()
        raise ConfigError("--soc", f"{chip!r}, but the GPU here is {here} ({name})")


def _records(dtype: str, quant_sim: bool) -> tuple[str, str]:
    """Rows that are rounded anyway are kept in the bytes they need."""
    return ("fp8_584", "fp4_68") if quant_sim and dtype == "bf16" else (dtype, dtype)


_INT8 = "INT8 checkpoints are made for A2 and A3; CUDA runs the FP8 and FP4 one they are made of"

CUDA = Backend(
    name="cuda",
    device=lambda: "cpu" if _is_interpreting() else "cuda",
    why_unavailable=_why_unavailable,
    proof=_proof,
    use_chip=_use_chip,
    records=_records,
    watch_compilations=watch_compilations,
    missing={
        "int8_act_quant": _INT8,
        "int8_gemm": _INT8,
        "expert_layer": _INT8,
        "grouped_int8_gemm": _INT8,
        "grouped_int8_gemm_swiglu": _INT8,
        "rms_norm_int8": _INT8,
    },
)

__all__ = ["CUDA"]
