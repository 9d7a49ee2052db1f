"""The references themselves, on the device: what torch_npu runs without any V4 kernel."""

from __future__ import annotations

from typing import Any

import torch

from v4_ascend.backends.ascend.soc import NARROW_CHIPS, current_chip
from v4_ascend.ops import OPS
from v4_ascend.ops.int8_fused import is_let_go
from v4_ascend.ops.op import Op

# Fp8 values or e8m0 scales come out, or are made and taken back.
MAKES_NARROW = dict.fromkeys(("act_quant", "fp4_act_quant", "swiglu_act_quant"), "the result")
MAKES_NARROW |= dict.fromkeys(("fp8_round_trip", "fp4_round_trip"), "what is rounded to")
LETS_GO = {"grouped_int8_gemm_swiglu": "weight", "expert_layer": "w13"}  # when it is prepared
NARROW_RECORDS = ("fp8", "fp4")


NARROW_DTYPES = frozenset((torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu))


def _is_narrow(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith(NARROW_RECORDS)
    return getattr(value, "dtype", None) in NARROW_DTYPES


def _register(op: Op[..., Any]) -> None:
    made = [MAKES_NARROW[op.name]] if op.name in MAKES_NARROW else []
    may_round = "fp8" in op.signature.parameters
    may_lack = LETS_GO.get(op.name)

    def why_not(*args: Any, **kwargs: Any) -> str | None:
        if may_lack and is_let_go(op.signature.bind(*args, **kwargs).arguments[may_lack]):
            return f"{may_lack} was let go: it is kept in the layout of the vendor's kernels"
        chip = current_chip()
        if chip in NARROW_CHIPS:
            return None
        # Asked at every call: names are looked up for a refusal alone.
        is_given = True in map(_is_narrow, (*args, *kwargs.values()))
        if not (made or may_round or is_given):
            return None
        values = op.signature.bind(*args, **kwargs).arguments
        narrow = [name for name, value in values.items() if _is_narrow(value)]
        narrow += made + ["fp8 rows"] * bool(values.get("fp8"))
        if not narrow:
            return None
        return (
            f"{', '.join(narrow)}: {chip} has no fp8 and no fp4 (int8 weights: v4-ascend convert)"
        )

    def plain(*args: Any, **kwargs: Any) -> Any:
        return op.reference(*args, **kwargs)

    plain.__doc__ = f"Run the reference of {op.name} on the npu device."
    plain.__signature__ = op.signature  # type: ignore[attr-defined]  # inspect honours it
    op.kernel("ascend", provider="torch", why_not=why_not)(plain)


for _op in OPS.values():
    _register(_op)
