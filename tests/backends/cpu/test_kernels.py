"""Every CPU kernel against its reference, on every case."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from v4_ascend.backends import BACKENDS
from v4_ascend.backends.cpu.compiled import library
from v4_ascend.backends.cpu.compiled.gemm import grouped_gemm_compiled
from v4_ascend.ops import OPS
from v4_ascend.ops.check import assert_close
from v4_ascend.ops.moe import Solo
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
    for kernel in op.kernels["cpu"]:
        assert_close(kernel.fn(**dirty), op.reference(**clean), op.tolerance)


def compiled(op):
    return next(k for k in OPS[op].kernels["cpu"] if k.provider == "c++")


def test_the_compiled_kernels_are_here_or_say_why_not():
    if shutil.which("g++") or shutil.which("c++"):
        assert library.MISSING is None
    else:
        assert "no C++ compiler" in library.MISSING


NO_LIBRARY = """
import importlib.util as u, sys
find = u.find_spec
u.find_spec = lambda name: None if name.endswith("._kernels") else find(name)
from v4_ascend.cli import main
sys.argv = ["v4-ascend", *sys.argv[1:]]
main()
"""


def test_without_the_library_plain_kernels_run_and_the_reason_is_told():
    command = [sys.executable, "-c", NO_LIBRARY, "verify", "--backend", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [r for r in json.loads(done.stdout)["data"]["results"] if r["provider"] == "c++"]
    assert told
    assert {(r["outcome"], r["why"]) for r in told} == {("refused", told[0]["why"])}
    assert "were not built" in told[0]["why"]


@pytest.mark.parametrize("op", ["grouped_gemm", "sparse_attn", "index_select"])
def test_the_number_of_threads_changes_no_bit(op):
    """Each sum is one thread's, whole."""
    kernel = compiled(op)
    case = next(c for c in OPS[op].cases() if c.slow and not kernel.why_not(**OPS[op].inputs(c)))
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(kernel.fn(**OPS[op].inputs(case)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_what_is_no_number_stays_none_and_ends_nothing(n_tokens):
    case = next(c for c in OPS["index_select"].cases() if c.id.startswith("fp32-edges"))
    inputs = OPS["index_select"].inputs(case)
    inputs["q"].fill_(float("nan"))
    ids = compiled("index_select").fn(**inputs)
    assert bool((ids >= -1).all())
    x = torch.full((n_tokens, 33), float("nan"))
    assert bool(compiled("rms_norm").fn(x, torch.ones(33), 1e-6).isnan().all())
    x = x.bfloat16()
    assert bool(compiled("rms_norm").fn(x, torch.ones(33), 1e-6).isnan().all())
    _, chosen = compiled("topk_gate").fn(
        torch.full((n_tokens, 9), float("nan")), torch.ones(9), 3, 1.5
    )
    assert bool(((chosen >= 0) & (chosen < 9)).all())


@pytest.mark.parametrize(("name", "group"), [("act_quant", 128), ("fp4_act_quant", 32)])
def test_every_bf16_value_is_rounded_as_the_reference_rounds_it(name, group):
    x = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)
    x = x[x.isfinite()]
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    x = x[: len(x) // group * group].view(1, -1)
    for rows in (x, x.float() * 1.0625):  # and between them, where ties are
        ours, theirs = compiled(name).fn(rows, group), OPS[name].reference(rows, group)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_ids_that_are_no_experts_and_tensors_with_gaps_are_refused():
    """In C either would read or write where nothing of ours lies."""
    logits, table = torch.zeros(2, 8), torch.tensor([[0, 1], [2, 8]])
    with pytest.raises(IndexError, match="1 of 4 expert ids are no experts"):
        compiled("hash_gate").fn(logits, table, torch.tensor([0, 1]), 1.5)
    x, ids, weights = torch.zeros(2, 4), torch.tensor([[0, -1], [1, 2]]), torch.ones(2, 2)
    with pytest.raises(IndexError, match="1 of 4"):
        compiled("moe_dispatch").fn(x, ids, weights, 3, Solo(), False)
    with pytest.raises(ValueError, match="strides"):
        library.pointer(torch.zeros(4, 4).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 33), (3, 64), (7, 95), (10, 128)])
def test_panels_of_any_shape_multiply_and_rows_are_the_same_in_any_company(n, k, dtype):
    if library.MISSING is not None:
        return  # the test of its absence says why
    g = torch.Generator().manual_seed(n)
    sizes = torch.tensor([0, 1, 70, 3, 2, 9])  # more than pass a panel at once, and fewer
    x = torch.randn(85, k, generator=g)
    weight = torch.randn(len(sizes), n, k, generator=g).to(dtype)
    got = grouped_gemm_compiled(x, None, weight, None, sizes, torch.float32)
    of_row = weight[torch.repeat_interleave(torch.arange(len(sizes)), sizes)].double()
    want = torch.einsum("rk,rnk->rn", x.double(), of_row)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * k**0.5)
    alone = torch.zeros_like(sizes)
    alone[2] = 1
    row = grouped_gemm_compiled(x[40:41], None, weight, None, alone, torch.float32)
    assert torch.equal(row[0], got[40])
