"""The vendor's libraries, found when the first kernel needs them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch

from v4_ascend.errors import BackendUnavailableError

EMULATION = "v4_ascend.emulation.npu"  # whoever imported it runs on host memory


def is_emulated() -> bool:
    """Whether this process's NPUs are emulated."""
    return EMULATION in sys.modules


def why_no_npu() -> str | None:
    """Return None if an NPU, real or emulated, can be used, else the reason."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed (pip install 'v4-ascend[ascend]', and CANN)"
    try:
        npu = torch_npu().npu
    except (ImportError, RuntimeError, OSError) as e:
        return f"torch_npu cannot be loaded: {e}; source CANN's set_env.sh first"
    return None if npu.is_available() else "torch_npu finds no NPU (npu-smi info lists them)"


@cache
def torch_npu() -> ModuleType:
    """Import torch_npu."""
    return importlib.import_module("torch_npu")


def c_ascend(name: str) -> Any:
    """Return an operator of the library that vllm-ascend builds for the chip.

    Raises:
        BackendUnavailableError: it is not installed, or was built without this operator.
    """
    if not has_c_ascend(name):
        raise BackendUnavailableError(
            f"torch.ops._C_ascend.{name} is not there: "
            f"{why_no_c_ascend() or 'vllm-ascend is built for another chip'}"
        )
    return getattr(torch.ops._C_ascend, name)


def has_c_ascend(name: str) -> bool:
    """Whether the library is here and has this operator."""
    # An emulated NPU has defined the operators already.
    return hasattr(torch.ops._C_ascend, name) or (
        why_no_c_ascend() is None and hasattr(torch.ops._C_ascend, name)
    )


@cache
def why_no_c_ascend() -> str | None:
    """Load the library without vLLM; return None or why that failed.

    Importing its C module freezes ASCEND_RT_VISIBLE_DEVICES: set that before.

    Source: vllm-ascend vllm_ascend/utils.py, bootstrap_custom_op_env.
    """
    if importlib.util.find_spec("vllm_ascend") is None:
        return "vllm-ascend is not installed (pip install vllm-ascend, built for this chip)"
    try:
        importlib.import_module("vllm_ascend.utils").bootstrap_custom_op_env()
        torch_npu()
        importlib.import_module("vllm_ascend.vllm_ascend_C")  # registers the operators
        importlib.import_module("vllm_ascend.meta_registration")  # their shapes, for graphs
    except (ImportError, AttributeError, RuntimeError, OSError) as e:
        return f"vllm-ascend's operators cannot be loaded: {e}"
    return None


@cache
def why_no_triton() -> str | None:
    """Return None if the triton that is installed compiles for Ascend, else the reason."""
    try:
        importlib.metadata.version("triton-ascend")
    except importlib.metadata.PackageNotFoundError:
        return "triton-ascend is not installed (pip install triton-ascend)"
    return None
