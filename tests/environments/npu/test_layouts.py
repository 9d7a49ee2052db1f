"""Weights in FRACTAL_NZ: once, where they were, with the values they had."""

import pytest
import torch
import torch_npu

from v4_ascend.backends import BACKENDS
from v4_ascend.ops import OPS, use_policy

NZ = 29
SHAPES = {"int8_gemm": "bfloat16-3x200x384", "fp8_gemm": "bfloat16-3x200x384"}


def _case(name):
    op = OPS[name]
    return op, next(c for c in op.cases() if c.id == SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_a_prepared_weight_lies_in_tiles(name):
    BACKENDS["ascend"].use_chip(None)
    op, case = _case(name)
    inputs = {k: v.npu() if torch.is_tensor(v) else v for k, v in op.inputs(case).items()}
    weight, before = inputs["b"], op.inputs(case)["b"]
    with use_policy(backend="ascend"):
        op.prepare_inputs(inputs)
        assert int(torch_npu.get_npu_format(weight)) == NZ
        assert torch.equal(weight.cpu().view(torch.int8), before.view(torch.int8))
        assert weight.T.is_contiguous()  # as the product reads it
        got = op(**inputs).cpu()
        want = op.reference(**op.inputs(case))
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)


def test_a_weight_with_a_side_of_one_stays_as_it_was():
    """The vendor's page says a side of 1 may not be in tiles."""
    BACKENDS["ascend"].use_chip(None)
    weight = torch.ones(1, 128, dtype=torch.int8).npu()
    with use_policy(backend="ascend"):
        OPS["int8_gemm"].prepare(weight, torch.ones(1).npu())
    assert int(torch_npu.get_npu_format(weight)) != NZ
