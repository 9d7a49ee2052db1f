"""MindSpore's operators on its CPU target: operator by operator, and as graphs."""

import pytest
import torch

from v4_ascend.backends import BACKENDS
from v4_ascend.backends.mindspore import exchange
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.errors import UnsupportedOpError
from v4_ascend.ops import OPS, fp8_gemm, use_policy
from v4_ascend.runtime.bisect import bisect
from v4_ascend.runtime.compare import compare, open_pair
from v4_ascend.runtime.parity import Recording, record, write_record
from v4_ascend.runtime.verify import Selection, verify

MINDSPORE = BACKENDS["mindspore"]
OWN = [op.name for op in OPS.values() if op.kernels.get("mindspore")]


def _progress(done, total):
    pass


def test_it_can_run_here():
    assert MINDSPORE.why_unavailable() is None


def test_numpy_2_is_refused_before_mindspore_goes_wrong(monkeypatch):
    monkeypatch.setattr("numpy.__version__", "2.2.6")
    assert "numpy 2.2.6: mindspore needs numpy<2" in MINDSPORE.why_unavailable()


def _all_pass(selection):
    results = list(verify(MINDSPORE, selection, _progress))
    assert [f"{r.case}: {r.why}" for r in results if r.outcome == "failed"] == []
    assert any(r.outcome == "passed" for r in results), "refuses every case"


@pytest.mark.parametrize(
    "shapes", ["tiny", *(pytest.param(m, marks=pytest.mark.slow) for m in ("flash", "pro"))]
)
@pytest.mark.parametrize("op", OWN)
def test_kernels_are_the_reference(op, shapes):
    _all_pass(Selection(op, None, shapes))


@pytest.mark.parametrize("op", OWN)
def test_kernels_are_the_reference_as_graphs(op):
    """Two cases an operator: every other shape would be compiled anew."""
    cases = [c.id for c in OPS[op].cases() if not c.models]
    with exchange.graph_mode():
        for case in {cases[-1], cases[len(cases) // 2 - 1]}:
            _all_pass(Selection(op, case))


def test_memory_is_shared_both_ways():
    x = torch.zeros(4, 3)
    there = exchange.to_mindspore(x)
    x[0, 0] = 7.0
    assert float(there[0, 0]) == 7.0
    back = exchange.to_torch(there)
    assert back.data_ptr() == x.data_ptr()


def test_what_mindspore_lacks_is_refused_or_falls_back_aloud(caplog):
    inputs = OPS["fp8_gemm"].inputs(next(c for c in OPS["fp8_gemm"].cases() if "1x" in c.id))
    with use_policy(backend="mindspore"), pytest.raises(UnsupportedOpError, match="no kernel"):
        fp8_gemm(**inputs)
    with use_policy(backend="mindspore", fallback="reference"):
        fp8_gemm(**inputs)
    assert "fp8_gemm runs its reference on mindspore" in caplog.text


def test_grouped_matmul_has_no_cpu_kernel():
    """Why grouped_gemm is missing: the day this fails, it can be written.

    What it does instead varies with the call: an error, or an empty tuple and no error.
    """
    import mindspore as ms

    x, weight = ms.Tensor(torch.ones(2, 4).numpy()), ms.Tensor(torch.ones(1, 4, 3).numpy())
    sizes = ms.Tensor([2], ms.int64)
    arguments = {"group_list": sizes, "split_item": 3, "group_type": 0, "group_list_type": 1}
    try:
        made = ms.ops.auto_generate.grouped_matmul_v4([x], [weight], **arguments)
        made = [m.asnumpy() for m in made]
    except RuntimeError as e:
        made = str(e)
    assert made == [] or "The kernel GroupedMatmulV4 unregistered" in made


@pytest.mark.parametrize(("kind", "dtype"), [("fp32", "fp32"), ("fp8", "fp32"), ("fp8", "bf16")])
def test_the_network_gives_the_cpu_references_logits(tmp_path, kind, dtype):
    config = in_format(ModelConfig.read(preset_path("tiny")), kind)
    write_synthetic(config, tmp_path / "c", seed=2)
    checkpoint = Checkpoint(tmp_path / "c")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, 140), generator=g)
    files = []
    for backend in ("cpu", "mindspore"):
        how = Recording(prefill=134, backend=backend, fallback="reference", dtype=dtype, trace=True)
        files.append(tmp_path / f"{backend}.safetensors")
        write_record(files[-1], *record(checkpoint, ids, how, _progress))
    a, b, bounds = open_pair(*files)
    found = compare(a, b, bounds)
    assert found.problems == []
    assert found.differences["backend"] == ("cpu", "mindspore")
    if kind == "fp32":
        assert found.worst_error < 1e-5
    if dtype == "fp32":  # no operator parts from the reference, though single roundings do
        assert bisect(a, b, bounds) is None
