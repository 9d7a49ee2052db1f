"""The vendor's aclnn operators, called from MindSpore on an Ascend device.

Source in the repository, compiled by MindSpore's CustomOpBuilder where CANN is. Never compiled
against CANN and never run: without CANN, tests compare argument orders and check the syntax.
They are no kernels of the dispatcher, whose MindSpore tensors live on the CPU: call them by
hand, in PyNative mode, on ``mindspore.Tensor``.

    aclnn_operators().npu_hc_post(x, residual, post, comb)
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from v4_ascend.backends.mindspore import MINDSPORE
from v4_ascend.backends.mindspore.aclnn.interface import why_not_installed
from v4_ascend.backends.mindspore.aclnn.operators import AclnnOperators
from v4_ascend.errors import BackendUnavailableError

NAME = "v4_ascend_aclnn"


def why_unavailable() -> str | None:
    """Return None if the operators can be built and called here, else the reason."""
    opp = os.environ.get("ASCEND_OPP_PATH")
    if not opp:
        return "ASCEND_OPP_PATH is not set (source CANN's set_env.sh)"
    if not Path(opp).is_dir():
        return f"ASCEND_OPP_PATH is {opp}, which is no folder (source CANN's set_env.sh)"
    if why := MINDSPORE.why_unavailable():
        return why
    for tool in ("g++", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed; MindSpore compiles custom operators with it"
    return why_not_installed(_packages(Path(opp)))


@cache
def load() -> Any:
    """Compile the operators with CustomOpBuilder, once, and return the module.

    Raises:
        BackendUnavailableError: no CANN, no MindSpore, or no operator package that fits.
    """
    if why := why_unavailable():
        raise BackendUnavailableError(f"MindSpore's aclnn operators: {why}")
    from mindspore.ops import CustomOpBuilder

    source = str(Path(__file__).with_name("v4_ops.cc"))
    return CustomOpBuilder(NAME, source, backend="Ascend").load()


def aclnn_operators() -> AclnnOperators:
    """Return the operators; the first call compiles them.

    Raises:
        BackendUnavailableError: as of `load`.
    """
    return AclnnOperators(load())


def _packages(opp: Path) -> list[Path]:
    """Where operator packages are: $ASCEND_CUSTOM_OPP_PATH, and vendors under CANN."""
    custom = os.environ.get("ASCEND_CUSTOM_OPP_PATH", "").split(":")
    return [*(Path(p) for p in custom if p), *sorted((opp / "vendors").glob("*/"))]


__all__ = ["AclnnOperators", "aclnn_operators", "load", "why_unavailable"]
