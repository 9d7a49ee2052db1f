"""The Triton kernels that the Ascend backend tries on A2 and A3, interpreted on the CPU.

They are the sources that CUDA's kernels are made of: there is no variant for Ascend. What is
its own is which operators it takes and what it refuses, and that is what runs here.
"""

import pytest
import torch

from v4_ascend.backends.ascend import soc, triton_kernels
from v4_ascend.ops import OPS, use_policy
from v4_ascend.ops.check import assert_close

KERNELS = {name: k for name in OPS for k in soc.kernels_of(OPS[name], "a3") if "triton" in k.name}
CASES = [
    pytest.param(OPS[name], kernel, case, id=f"{name}-{case.id}")
    for name, kernel in KERNELS.items()
    for case in OPS[name].cases()
    if not case.models
]


def _outputs(op, result):
    result = op.canonical(result)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("op", "kernel", "case"), CASES)
def test_it_is_the_reference_where_it_does_not_refuse(op, kernel, case):
    inputs = op.inputs(case)
    if why := kernel.why_not(**inputs):
        assert op.name == "index_scores"
        assert "triton-ascend lowers bf16 and fp32" in why or "lowers fp32 and bf16" in why
        return
    with torch.inference_mode(), use_policy(kernels="fast"):
        got = _outputs(op, kernel.fn(**inputs))
        assert_close(got, _outputs(op, op.reference(**op.inputs(case))), op.tolerance)


def test_these_are_all_and_each_runs():
    assert set(KERNELS) == set(triton_kernels.OWN)
    for name, kernel in KERNELS.items():
        cases = [c for c in OPS[name].cases() if not c.models]
        assert any(kernel.why_not(**OPS[name].inputs(c)) is None for c in cases), name
