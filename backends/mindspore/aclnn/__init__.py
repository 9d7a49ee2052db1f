"""The vendor's aclnn operators, called from MindSpore on an Ascend device.

Source in the repository, compiled by MindSpore's CustomOpBuilder where CANN is. Never compiled
against CANN and never run: without CANN, tests compare argument orders, check the syntax, and let
MindSpore's compiler trace graphs of the operators on its CPU target. They are no kernels of the
dispatcher, whose MindSpore tensors live on the CPU: call them by hand, on ``mindspore.Tensor``.

    aclnn_operators().npu_hc_post(x, residual, post, comb)      # eager
    operators = load()                                          # and in graphs

    @mindspore.jit
    def layer(x, residual, post, comb):
        return operators.npu_hc_post(x, residual, post, comb)

In a graph tensors have no gaps: a cache whose pages lie apart would be copied, and what is written
to it lost.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from v4_ascend.backends.mindspore import MINDSPORE
from v4_ascend.backends.mindspore.aclnn.graph import write_definitions
from v4_ascend.backends.mindspore.aclnn.interface import why_not_installed
from v4_ascend.backends.mindspore.aclnn.operators import AclnnOperators
from v4_ascend.errors import BackendUnavailableError

NAME = "v4_ascend_aclnn"
SOURCES = ("v4_ops.cc", "v4_graph.cc", "v4_graph_kernels.cc")
# MindSpore 2.10 links with it, behind a --rpath that takes it for its path.
CORE = "-Wl,--no-as-needed -lmindspore_core"


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

    Its functions are called eagerly or in a graph.

    Raises:
        BackendUnavailableError: no CANN, no MindSpore, or no operator package that fits.
    """
    if why := why_unavailable():
        raise BackendUnavailableError(f"MindSpore's aclnn operators: {why}")
    from mindspore.ops import CustomOpBuilder

    sources = [str(Path(__file__).with_name(name)) for name in SOURCES]
    with tempfile.TemporaryDirectory() as folder:
        definitions = write_definitions(Path(folder))
        builder = CustomOpBuilder(NAME, sources, backend="Ascend", ldflags=CORE, op_def=definitions)
        return builder.load()


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
