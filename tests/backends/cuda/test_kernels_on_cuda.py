"""Every kernel of the CUDA backend on every case: under Triton's interpreter, or on a GPU."""

import pytest
import torch

from v4_ascend.backends import BACKENDS
from v4_ascend.ops import OPS, act_quant, swiglu, swiglu_act_quant, use_policy
from v4_ascend.ops.gemm import ACT_GROUP
from v4_ascend.runtime.verify import Selection, verify

CUDA = BACKENDS["cuda"]
# At real widths the interpreter takes minutes for attention and products; these take seconds.
WIDE = (
    "act_quant fp4_act_quant rms_norm head_rms_norm hc_post topk_gate hash_gate swiglu store_rows "
    "swiglu_act_quant"
)


def _all_pass(selection):
    results = list(verify(CUDA, selection, lambda done, total: None))
    assert [f"{r.kernel} {r.case}: {r.why}" for r in results if r.outcome == "failed"] == []
    kernels = {k.name for k in OPS[selection.op].kernels["cuda"]}
    assert kernels == {r.kernel for r in results if r.outcome == "passed"}, "refuses every case"
    assert {r.proof for r in results} == {CUDA.proof()}


@pytest.mark.parametrize("op", [op for op in OPS if op not in CUDA.missing])
def test_kernels_are_the_reference(op):
    _all_pass(Selection(op))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize("op", WIDE.split())
def test_kernels_are_the_reference_at_real_widths(op, model):
    _all_pass(Selection(op, None, model))


@pytest.mark.slow
def test_the_indexer_makes_the_ties_of_the_published_code():
    """Its 64 heads sum to more bits than bf16 has: rounding makes ties, which choose rows."""
    _all_pass(Selection("index_select", "fp4_68", "pro"))


@pytest.mark.parametrize("model", [(), ("flash",)])
def test_the_activation_quantised_is_its_parts_to_the_byte(model):
    cases = [c for c in OPS["swiglu_act_quant"].cases() if c.models == model]
    assert len(cases) > 1
    with use_policy(backend="cuda"):
        for case in cases:
            made = OPS["swiglu_act_quant"].inputs(case).items()
            inputs = {k: v.to(CUDA.device()) if torch.is_tensor(v) else v for k, v in made}
            parts = act_quant(swiglu(**inputs), ACT_GROUP)
            for got, want in zip(swiglu_act_quant(**inputs), parts, strict=True):
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_without_a_device_it_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no CUDA device" in CUDA.why_unavailable()
    assert CUDA.device() == "cuda"


@pytest.mark.parametrize("op", ["moe_permute", "moe_dispatch"])
def test_many_rows_are_ordered_by_sorting_them(op, monkeypatch):
    monkeypatch.setattr("v4_ascend.backends.cuda.moe.FEW", 8)
    _all_pass(Selection(op))
