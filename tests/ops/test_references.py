"""Every op: its cases run, and say what its contract says."""

import pytest
import torch
from planting import planted_kernel

from v4_ascend.backends import BACKENDS
from v4_ascend.ops import OPS, use_policy
from v4_ascend.ops.check import assert_close

DESIGN = """
rms_norm head_rms_norm rope rope_inverse hadamard act_quant fp4_act_quant fp8_gemm
fp4_gemm grouped_gemm heads_gemm linear compress_kv index_scores index_topk index_select sparse_attn
hc_pre hc_post hc_head topk_gate hash_gate swiglu swiglu_act_quant moe_permute moe_unpermute
moe_dispatch moe_combine sample store_rows int8_act_quant int8_gemm grouped_int8_gemm
grouped_int8_gemm_swiglu rms_norm_int8 expert_layer new_rows fp8_round_trip fp4_round_trip
"""


def _cases():
    for op in OPS.values():
        for case in op.cases():
            marks = [pytest.mark.slow] if case.slow else []
            yield pytest.param((op, case), id=f"{op.name}-{case.id}", marks=marks)


def _tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_the_operators_are_those_of_the_design():
    assert set(OPS) == set(DESIGN.split())


@pytest.fixture(scope="module", params=list(_cases()))
def ran(request):
    """An op, what a case gives it made twice, and the first after a run, with what that gave.

    Made for both tests of a case, one case at a time: real widths take seconds and gigabytes.
    """
    op, case = request.param
    inputs, before = op.inputs(case), op.inputs(case)
    return op, before, inputs, op.reference(**inputs)


def test_a_reference_changes_only_what_it_declares(ran):
    op, before, inputs, _ = ran
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and name not in op.mutates:
            assert_close(value, before[name], {})


def test_a_reference_is_finite_and_repeats_itself(ran):
    op, before, _, first = ran
    again = op.reference(**{k: v.clone() if torch.is_tensor(v) else v for k, v in before.items()})
    assert_close(op.canonical(again), op.canonical(first), {})
    for tensor in _tensors(first):
        values = tensor.double()
        hidden = values == float("-inf") if op.name == "index_scores" else values.isnan() & False
        assert (values.isfinite() | hidden).all()


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_cases_cover_empty_and_real_widths(op):
    ids = [case.id for case in op.cases()]
    assert any("empty" in i or "0x" in i or i.endswith("-0") for i in ids), ids
    assert {model for case in op.cases() for model in case.models} == {"flash", "pro"}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_docstring_gives_shapes_and_return(op):
    assert "Shapes" in op.__doc__
    assert "return" in op.__doc__ or "as `" in op.__doc__


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda b: b.name)
def test_every_op_is_implemented_or_listed_as_missing(backend):
    have = {op.name for op in OPS.values() if op.kernels.get(backend.name)}
    have |= set(OPS) if backend.name == "cpu" else set()
    assert have.isdisjoint(backend.missing), "implemented, so no longer missing"
    assert have | set(backend.missing) == set(OPS)


def test_the_policy_reference_passes_kernels_by():
    op = OPS["hadamard"]
    x = torch.ones(1, 4)
    with planted_kernel(op, "cpu", _wrong_hadamard):
        with use_policy(kernels="reference"):
            assert torch.equal(op(x), op.reference(x))
        assert torch.equal(op(x), x)


def _wrong_hadamard(x):
    return x
