"""Every CPU kernel against its reference, on every case."""

import pytest
import torch

from v4_ascend.backends import BACKENDS
from v4_ascend.ops import OPS
from v4_ascend.ops.check import assert_close
from v4_ascend.runtime.verify import Selection, verify

CPU = BACKENDS["cpu"]
# Exchanges between ranks are tested with ranks: tests/runtime/test_parallel.py.
EXCHANGES = {"moe_dispatch", "moe_combine"}
OWN = [op.name for op in OPS.values() if op.kernels.get("cpu") and op.name not in EXCHANGES]


def _results(op, shapes):
    results = list(verify(CPU, Selection(op, None, shapes), lambda done, total: None))
    return [r for r in results if r.kernel != "reference"]


@pytest.mark.parametrize(
    "shapes", ["tiny", *(pytest.param(m, marks=pytest.mark.slow) for m in ("flash", "pro"))]
)
@pytest.mark.parametrize("op", OWN)
def test_kernels_are_the_reference(op, shapes):
    results = _results(op, shapes)
    assert [f"{r.kernel} {r.case}: {r.why}" for r in results if r.outcome == "failed"] == []
    kernels = {r.kernel for r in results}
    assert kernels == {k.name for k in OPS[op].kernels["cpu"]}
    for kernel in kernels:
        assert any(r.outcome == "passed" for r in results if r.kernel == kernel), "refuses all"


def test_rows_nobody_sees_may_hold_anything():
    op = OPS["sparse_attn"]
    case = next(c for c in op.cases() if c.id == "fp32-csa-ragged")
    clean, dirty = op.inputs(case), op.inputs(case)
    dirty["indices"] = clean["indices"] = torch.full_like(clean["indices"], -1)
    dirty["compressed"].fill_(float("nan"))
    (kernel,) = op.kernels["cpu"]
    assert_close(kernel.fn(**dirty), op.reference(**clean), op.tolerance)
