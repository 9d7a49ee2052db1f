"""The table of Ascend kernels, and what follows from it, on a machine without an NPU."""

from pathlib import Path

import pytest
import torch

from v4_ascend.backends import BACKENDS
from v4_ascend.backends.ascend import soc
from v4_ascend.errors import ConfigError, UnsupportedOpError
from v4_ascend.ops import OPS, use_policy
from v4_ascend.runtime.capability import Probes, capabilities

ASCEND = BACKENDS["ascend"]
PROBES = Probes()


@pytest.fixture(autouse=True)
def _default_chip():
    yield
    ASCEND.use_chip(None)


def test_every_kernel_has_a_row_and_every_row_a_kernel():
    kernels = {
        (op.name, k.name)
        for op in OPS.values()
        for k in op.kernels["ascend"]
        if k.provider != "torch"
    }
    rows = [(row.op, row.kernel) for row in soc.TABLE]
    assert set(rows) == kernels
    assert len(rows) == len(set(rows))
    for row in soc.TABLE:
        provider = {k.name: k.provider for k in OPS[row.op].kernels["ascend"]}[row.kernel]
        namespace = {"_C_ascend": "_C_ascend", "torch_npu": "npu", "triton": "triton"}[provider]
        assert row.vendor.startswith(f"{namespace}::")
        assert all((row.chips, row.limits, row.source, row.cann))


@pytest.mark.parametrize("chip", soc.CHIPS)
def test_vendor_first_then_stock_then_triton_then_torch(chip):
    ASCEND.use_chip(chip)
    for op in OPS.values():
        ranks = [soc.PROVIDERS.index(k.provider) for k in op.tried("ascend")]
        assert ranks == sorted(ranks)
        assert ranks[-1] == soc.PROVIDERS.index("torch")


def test_each_chip_gets_the_attention_its_build_has():
    first = {}
    for chip in soc.CHIPS:
        ASCEND.use_chip(chip)
        first[chip] = OPS["sparse_attn"].tried("ascend")[0].name
    assert first == {
        "a2": "sparse_attn_sharedkv",
        "a3": "sparse_attn_sharedkv",
        "950": "kv_quant_sparse_attn_sharedkv",
    }


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("950dt", "950"),
        ("ascend-950dt-96", "950"),
        ("Ascend950PR_9589", "950"),
        ("a5", "950"),
        ("910b", "a2"),
        ("Ascend910B3", "a2"),
        ("910_9391", "a3"),
        ("ascend910c", "a3"),
        ("A3", "a3"),
        ("ascend-a2-64", "a2"),
    ],
)
def test_a_chip_has_many_names(name, chip):
    ASCEND.use_chip(name)
    assert soc.current_chip() == chip


def test_a_chip_without_v4_operators_is_refused():
    with pytest.raises(ConfigError, match="no chip '310p'"):
        ASCEND.use_chip("310p")


@pytest.mark.parametrize(
    ("chip", "records"), [("a2", ("bf16", "int8")), ("950", ("fp8_640", "fp8_132"))]
)
def test_caches_are_what_the_chips_attention_reads(chip, records):
    ASCEND.use_chip(chip)
    assert ASCEND.records("bf16", True) == records
    assert ASCEND.records("fp32", True) == ("fp32", "fp32")


FALLS_ON_VENDOR = {
    "a3": {"compress_kv", "hc_pre", "hc_post", "topk_gate", "hash_gate", "rope", "rms_norm"},
    "950": {"compress_kv", "hc_pre", "hc_post", "topk_gate", "fp8_gemm", "fp4_gemm", "rms_norm"},
}


@pytest.mark.parametrize("chip", FALLS_ON_VENDOR)
def test_real_shapes_fall_on_the_vendors_kernels(chip):
    """What `v4-ascend ops --soc` says: every case of these ops, both models."""
    found = {c.op: c for c in capabilities(ASCEND, chip, PROBES)}
    assert set(found) == set(OPS)
    for name in FALLS_ON_VENDOR[chip]:
        providers = {choice.provider for choice in found[name].choices}
        assert providers <= {"_C_ascend", "torch_npu"}, (name, found[name])


def test_plain_torch_is_counted_honestly():
    """What the README says. A kernel added for one of these shortens the list."""
    by_triton = ["hadamard", "hc_head", "index_scores", "index_topk", "swiglu"]
    assert soc.plain_only("a2") == soc.plain_only("a3") == ["linear", "sample"]
    assert sorted(soc.plain_only("950")) == sorted(
        [*by_triton, "linear", "sample", "act_quant", "fp4_act_quant"]
        + ["fp8_round_trip", "fp4_round_trip"]
    )


def test_the_readme_counts_what_the_table_has():
    text = (Path(__file__).parents[3] / "README.md").read_text()

    def counted(names):
        return f"{len(names)}: {', '.join(f'`{n}`' for n in names)}" if names else "none"

    for chip, named in {"a2": "A2, A3", "a3": "A2, A3", "950": "950"}.items():
        plain, absent = sorted(soc.plain_only(chip)), soc.absent(chip)
        assert f"| {named} | {counted(plain)} | {counted(absent)}" in text


@pytest.mark.parametrize("chip", soc.CHIPS)
def test_triton_stands_between_the_vendor_and_torch_on_a2_and_a3(chip):
    ASCEND.use_chip(chip)
    tried = [k.provider for k in OPS["swiglu"].tried("ascend")]
    assert tried == (["torch"] if chip == "950" else ["triton", "torch"])


def test_a_machine_without_triton_ascend_does_without_it(caplog):
    soc._warn_missing.cache_clear()
    soc.order("a2", only_installed=True)  # of what is left out, all is missing here
    assert {k.provider for k in OPS["swiglu"].tried("ascend")} == {"torch"}
    assert {k.provider for k in OPS["sparse_attn"].tried("ascend")} == {"torch"}
    said = [r.message for r in caplog.records]
    assert len(said) == 2  # once for each library, not for each kernel
    assert "kernels through triton are left out: triton-ascend is not installed" in caplog.text
    assert "kernels through _C_ascend are left out: vllm-ascend is not installed" in caplog.text


@pytest.mark.parametrize("chip", ["a2", "a3"])
@pytest.mark.parametrize("name", soc.NARROW_OPS)
def test_a_chip_without_fp8_says_so(chip, name):
    ASCEND.use_chip(chip)
    op = OPS[name]
    inputs = op.inputs(next(iter(op.cases())))
    with use_policy(backend="ascend"), pytest.raises(UnsupportedOpError, match="no fp8 and no fp4"):
        op(**inputs)


def _attention(**changes):
    case = next(c for c in OPS["sparse_attn"].cases() if c.id == "fp8_640-flash-csa")
    return OPS["sparse_attn"].inputs(case) | changes


def _refusal(name, kernel, inputs):
    (found,) = [k for k in OPS[name].tried("ascend") if k.name == kernel]
    return found.why_not(**inputs)


def test_attention_says_what_it_does_not_take():
    ASCEND.use_chip("950")
    kernel = "kv_quant_sparse_attn_sharedkv"
    good = _attention()
    assert _refusal("sparse_attn", kernel, good) is None
    for change, sentence in (
        ({"q": good["q"][:, :32]}, "32 heads, must be 64 or 128"),
        ({"q": good["q"].float()}, "must be bf16"),
        ({"q": good["q"][..., :256]}, "head_dim is 256"),
        ({"record": "bf16"}, "the record is bf16, it reads fp8_640"),
        ({"compressed": good["compressed"][:, :1]}, "compressed has pages of 1 rows"),
        ({"window_size": 64}, "window_size is 64"),
        ({"compress_ratio": 8}, "compress_ratio is 8"),
        ({"indices": torch.zeros(12, 1025, dtype=torch.int32)}, "1025 rows are chosen"),
    ):
        assert sentence in (_refusal("sparse_attn", kernel, good | change) or "")


def test_a_weight_nobody_prepared_is_refused():
    ASCEND.use_chip("950")
    op = OPS["compress_kv"]
    case = next(c for c in op.cases() if c.id == "bfloat16-r4-flash-512")
    inputs = op.inputs(case)
    assert "wkv was not prepared" in _refusal("compress_kv", "compressor", inputs)
    inputs["wgate"] += 1e-6  # now no bf16 value
    with use_policy(backend="ascend"):
        op.prepare_inputs(inputs)
    assert "wgate was not prepared, or has values" in _refusal("compress_kv", "compressor", inputs)
