"""The aclnn bindings for MindSpore, as far as text tells: no MindSpore and no CANN needed."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from v4_ascend.backends.mindspore import aclnn
from v4_ascend.backends.mindspore.aclnn import interface
from v4_ascend.emulation.stand_in import schemas
from v4_ascend.errors import BackendUnavailableError

SOURCE = Path(aclnn.__file__).with_name("v4_ops.cc").read_text()
RECORDED = interface.recorded()
FUNCTIONS = pytest.mark.parametrize("function", RECORDED.values(), ids=list(RECORDED))
# hc_eps before norm_eps; kv_quant_mode behind the sizes: as the vendor calls them.
REORDERED = ("aclnnHcPre", "aclnnKvQuantSparseAttnSharedkvMetadata")
TYPES = {"tensor": "Tensor", "int": "int", "float": "float", "bool": "bool", "str": "str"}


def schema_of(function):
    schema = torch._C.parse_schema(f"_C_ascend::{schemas()[function.operator][1]}")
    # What makes the output here is MindSpore's current device.
    return [a for a in schema.arguments if a.name != "device"]


def handed_over(source, function):
    (call,) = re.findall(rf"LAUNCH_ACLNN_FUNC\(\s*{function.name},([^)]*)\)", source)
    return [a.strip() for a in call.split(",")]


def parameters(source, function):
    """Names of the C++ function that is defined as the torch operator."""
    (name,) = re.findall(rf'Define<\d>\(&m, "{function.operator}", (\w+)\)', source)
    (listed,) = re.findall(rf"^Tensors {name}\(([^)]*)\) {{", source, re.MULTILINE)
    return [p.split()[-1].lstrip("&*") for p in listed.split(",")]


@FUNCTIONS
def test_the_source_hands_over_arguments_as_recorded(function):
    assert handed_over(SOURCE, function) == [a.name for a in function.arguments]


def test_a_swapped_argument_is_noticed():
    function = RECORDED["aclnnHcPre"]
    swapped = re.sub(r"hc_eps,(\s+)norm_eps,", r"norm_eps,\1hc_eps,", SOURCE)
    assert swapped != SOURCE
    assert handed_over(swapped, function) != [a.name for a in function.arguments]


@FUNCTIONS
def test_the_record_has_every_argument_of_the_torch_schema(function):
    """Beside them: outputs, and distances between pages, which torch reads off its tensors."""
    given = [a for a in function.arguments if a.kind != "out" and not a.name.endswith("_stride")]
    wanted = {
        a.name: str(a.type).removeprefix("Optional[").rstrip("]") for a in schema_of(function)
    }
    assert {a.name: TYPES[a.kind] for a in given} == wanted
    names = [a.name for a in given]
    for is_tensor in (True, False):
        ours = [n for n in names if (wanted[n] == "Tensor") == is_tensor]
        theirs = [n for n in wanted if (wanted[n] == "Tensor") == is_tensor]
        swaps = function.name in REORDERED and not is_tensor
        assert (sorted(ours) if swaps else ours) == (sorted(theirs) if swaps else theirs)


def test_every_call_of_the_source_is_recorded():
    assert set(re.findall(r"LAUNCH_ACLNN_FUNC\(\s*(\w+)", SOURCE)) == set(RECORDED)
    assert SOURCE.count("  Define<") == len(RECORDED)


@FUNCTIONS
def test_the_source_takes_what_torch_takes(function):
    assert parameters(SOURCE, function) == [a.name for a in schema_of(function)]


class Module:
    """Records what reaches it; returns as many outputs as a function has."""

    def __getattr__(self, operator):
        (function,) = (f for f in RECORDED.values() if f.operator == operator)
        outputs = sum(a.kind == "out" for a in function.arguments)
        return lambda *args: args if outputs == 1 else ((args, *[None] * (outputs - 1)))


@FUNCTIONS
def test_wrappers_take_what_torch_takes_and_pass_it_on_in_order(function):
    wrapper = getattr(aclnn.AclnnOperators(Module()), function.operator)
    wanted = schema_of(function)
    took = inspect.signature(wrapper).parameters.values()
    assert [p.name for p in took] == [a.name for a in wanted]
    defaults = [None if p.default is p.empty else p.default for p in took]
    assert defaults == [a.default_value if a.has_default_value() else None for a in wanted]
    got = wrapper(**{a.name: a.name for a in wanted})
    passed = got if got[0] == wanted[0].name else got[0]
    assert list(passed) == [a.name for a in wanted]


C_TYPES = {"tensor": "const aclTensor *", "out": "const aclTensor *", "int": "int64_t ",
           "float": "double ", "bool": "bool ", "str": "char *"}  # fmt: skip


@pytest.fixture
def cann(tmp_path, monkeypatch):
    """A CANN as far as `why_unavailable` looks at it, with an operator package that fits."""
    include = tmp_path / "opp/vendors/custom_transformer/op_api/include"
    include.mkdir(parents=True)
    for function in RECORDED.values():
        given = [C_TYPES[a.kind] + _camel(a.name) for a in function.arguments]
        handles = ["uint64_t *workspaceSize", "aclOpExecutor **executor"]
        text = f"aclnnStatus {function.name}GetWorkspaceSize(\n  {', '.join([*given, *handles])});"
        (include / f"aclnn_{function.operator}.h").write_text(text)
    monkeypatch.setenv("ASCEND_OPP_PATH", str(tmp_path / "opp"))
    monkeypatch.delenv("ASCEND_CUSTOM_OPP_PATH", raising=False)
    monkeypatch.setattr(aclnn, "MINDSPORE", SimpleNamespace(why_unavailable=lambda: None))
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    return include


def _camel(name):
    head, *tail = name.split("_")
    return head + "".join(t.capitalize() for t in tail) + "Optional"


def test_a_package_that_fits_is_accepted(cann):
    assert aclnn.why_unavailable() is None


@pytest.mark.parametrize("chip", interface.CHIPS)
def test_a_package_has_its_chips_functions_alone(cann, chip):
    """Packages are built per chip: the 950 has an attention of its own, and not the other."""
    for function in RECORDED.values():
        if chip not in function.chips:
            (cann / f"aclnn_{function.operator}.h").unlink()
    assert aclnn.why_unavailable() is None
    attention = next(f for f in RECORDED.values() if "SparseAttn" in f.name and chip in f.chips)
    (cann / f"aclnn_{attention.operator}.h").unlink()
    assert f"no operator package declares {attention.name}" in aclnn.why_unavailable()


@FUNCTIONS
def test_functions_are_recorded_for_the_chips_that_torch_has_them_on(function):
    assert function.chips == schemas()[function.operator][0]


@pytest.mark.parametrize(
    ("function", "before", "after", "why"),
    [
        ("npu_hc_pre_v2", "int64_t hcMult", "const aclTensor *preMix, int64_t hcMult",
         "aclnnHcPre takes 12 arguments, must be 11"),
        ("npu_hc_pre_v2", "hcEpsOptional, double normEps", "normEps, double hcEps",
         "has float normEps as argument 7, must be float hc_eps"),
        ("moe_gating_top_k_hash", "double routedScalingFactor", "int64_t groupSelectMode",
         "has int groupSelectModeOptional as argument 8, must be float routed_scaling_factor"),
        ("compressor", "aclnnCompressor", "aclnnCompressorV2",
         "no operator package declares aclnnCompressor"),
    ],
)  # fmt: skip
def test_a_package_with_other_arguments_is_refused(cann, function, before, after, why):
    header = cann / f"aclnn_{function}.h"
    text = header.read_text()
    assert before in text
    header.write_text(text.replace(before, after))
    assert why in aclnn.why_unavailable()


@pytest.mark.parametrize("opp", [None, "/nowhere/opp"])
def test_without_cann_loading_is_refused(monkeypatch, opp):
    monkeypatch.delenv("ASCEND_OPP_PATH", raising=False)
    if opp:
        monkeypatch.setenv("ASCEND_OPP_PATH", opp)
    with pytest.raises(BackendUnavailableError, match="aclnn operators: ASCEND_OPP_PATH is") as e:
        aclnn.aclnn_operators()
    assert e.value.exit_code == 4
    assert "set_env.sh" in str(e.value)
