"""What INT8 and INT4 experts hold once they are prepared: one copy, and who may still read it."""

import pytest
import torch

from v4_ascend.backends import BACKENDS, prepared
from v4_ascend.backends.ascend.activation import FIRST
from v4_ascend.backends.ascend.int8 import INT4
from v4_ascend.errors import UnsupportedOpError
from v4_ascend.ops import OPS, use_policy

ASCEND = BACKENDS["ascend"]
FUSED, PLAIN = OPS["grouped_int8_gemm_swiglu"], OPS["grouped_int8_gemm"]


@pytest.fixture(autouse=True)
def _chip():
    ASCEND.use_chip("a2")
    yield
    ASCEND.use_chip(None)


def _prepared(op, case):
    (found,) = [c for c in op.cases() if c.id == case]
    inputs = op.inputs(found)
    before = inputs["weight"].nbytes
    with use_policy(backend="ascend"):
        op.prepare_inputs(inputs)
    return inputs, before


def _held(*tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("case", ["int8-odd", "int4-many"])
def test_of_a_first_product_the_kernels_layout_alone_is_held(case):
    inputs, before = _prepared(FUSED, case)
    weight, matrix = inputs["weight"], prepared.get(inputs["weight_scale"], FIRST)[0]
    assert matrix.nbytes == before
    assert _held(weight, matrix) == before + 1
    assert weight.nbytes == before  # its shape and dtype are as they were


@pytest.mark.parametrize("case", ["int8-odd", "int4-many"])
def test_nobody_reads_a_weight_that_was_let_go(case):
    inputs, _ = _prepared(FUSED, case)
    with pytest.raises(ValueError, match="the weight was let go"):
        FUSED.reference(**inputs)
    (plain,) = [k for k in FUSED.tried("ascend") if k.name == "plain"]
    FUSED.try_in_order("ascend", [plain])
    with (
        use_policy(backend="ascend"),
        pytest.raises(UnsupportedOpError, match="weight was let go: it is kept in the layout"),
    ):
        FUSED(**inputs)


def test_of_int4_experts_the_weight_shows_what_the_kernel_reads():
    inputs, before = _prepared(PLAIN, "int4-bfloat16-odd")
    packed = prepared.get(inputs["weight_scale"], INT4)[0]
    assert _held(inputs["weight"], packed) == before
    (case,) = [c for c in PLAIN.cases() if c.id == "int4-bfloat16-odd"]
    assert torch.equal(inputs["weight"], PLAIN.inputs(case)["weight"])
    assert torch.equal(PLAIN.reference(**inputs), PLAIN.reference(**PLAIN.inputs(case)))


def test_int8_experts_of_a_second_product_are_read_where_they_lie():
    inputs, before = _prepared(PLAIN, "int8-bfloat16-odd")
    assert not prepared.has(inputs["weight_scale"], INT4)
    assert _held(inputs["weight"]) == before


def test_the_950_has_no_int4_and_keeps_such_experts_as_they_are():
    ASCEND.use_chip("950")
    inputs, before = _prepared(FUSED, "int4-many")
    assert _held(inputs["weight"]) == before
    whys = [k.why_not(**inputs) for k in FUSED.tried("ascend")]
    assert whys == ["the weight is int4", None]
