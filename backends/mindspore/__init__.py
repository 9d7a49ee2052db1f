"""MindSpore: the compression and DSA operators, norms, gates and mixing, in its own language.

Torch and MindSpore share one process and one memory; tensors live on torch's CPU device.
"""

from __future__ import annotations

import importlib.util

from v4_ascend.backends.backend import Backend, Proof
from v4_ascend.backends.mindspore import dense as dense
from v4_ascend.backends.mindspore import ragged as ragged

NUMPY_MAJOR = 1  # what MindSpore's binary is built for


def _why_unavailable() -> str | None:
    if importlib.util.find_spec("mindspore") is None:
        return "mindspore is not installed (pip install 'v4-ascend[mindspore]')"
    import numpy as np

    if int(np.__version__.partition(".")[0]) > NUMPY_MAJOR:
        # Its metadata accept it, import works, and the first operator fails or is wrong.
        return f"numpy {np.__version__}: mindspore needs numpy<2 (pip install 'numpy<2')"
    return None


def _proof() -> Proof:
    return "executed"  # on MindSpore's CPU target


_GEMM = "MindSpore has no FP8 or FP4 product on its CPU target, and none for MXFP4 at all"
_INT8 = "INT8 checkpoints are made for A2 and A3; no MindSpore kernel is written for them"
_MOVES = "moves rows and computes nothing; MindSpore would only copy what torch has"

MINDSPORE = Backend(
    name="mindspore",
    device=lambda: "cpu",
    why_unavailable=_why_unavailable,
    proof=_proof,
    missing={
        "fp4_act_quant": "MindSpore has no FP4 type",
        "fp8_gemm": _GEMM,
        "fp4_gemm": _GEMM,
        "int8_act_quant": _INT8,
        "int8_gemm": _INT8,
        "expert_layer": _INT8,
        "grouped_int8_gemm": _INT8,
        "grouped_int8_gemm_swiglu": _INT8,
        "rms_norm_int8": _INT8,
        "grouped_gemm": "mindspore's GroupedMatmul returns an empty tuple on CPU, without an error",
        "linear": "one plain product, which torch's CPU device makes",
        "heads_gemm": "one plain product of a batch of matrices, which torch's CPU device makes",
        "hadamard": "the indexer's rotation is part of the FP4 simulation, which torch does",
        "fp8_round_trip": "the FP8 simulation of a cache, which torch does",
        "fp4_round_trip": "the FP4 simulation of a cache; MindSpore has no FP4 type",
        "store_rows": _MOVES,
        "moe_permute": _MOVES,
        "moe_unpermute": _MOVES,
        "moe_dispatch": _MOVES,
        "moe_combine": _MOVES,
        "new_rows": "integers and angles of a step, which the host lays out before it begins",
        "sample": "a hash in 64-bit integers, defined by the reference on the host",
    },
)

__all__ = ["MINDSPORE"]
