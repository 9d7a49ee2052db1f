"""What MindSpore's compiler is told of the aclnn operators, as far as text and shapes go.

`tests/environments/mindspore/test_graphs.py` asks MindSpore itself.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from aclnn_calls import CALLS, T, returned

from v4_ascend.backends.mindspore import aclnn
from v4_ascend.backends.mindspore.aclnn import graph, interface
from v4_ascend.emulation.stand_in import schemas

FOLDER = Path(aclnn.__file__).parent
OPERATORS_H = (FOLDER / "graph_operators.h").read_text()
KERNELS = (FOLDER / "v4_graph_kernels.cc").read_text()
RECORDED = interface.recorded()
FUNCTIONS = pytest.mark.parametrize("function", RECORDED.values(), ids=list(RECORDED))
GETTERS = {"tensor": ("In", "OrEmpty"), "int": ("Int",), "float": ("Float",), "bool": ("Bool",),
           "str": ("Str",)}  # fmt: skip
BOUND = dict(re.findall(r"^  DO\((\w+), (\w+)\)", OPERATORS_H, re.M))


def schema_of(function):
    schema = torch._C.parse_schema(f"_C_ascend::{schemas()[function.operator][1]}")
    return [a for a in schema.arguments if a.name != "device"]


def parameters(name):
    (listed,) = re.findall(rf"struct {name}\b[^{{]*{{\s*enum Parameters {{([^}}]*)}}", OPERATORS_H)
    return [p.strip() for p in listed.split(",")]


def handed_over(source, name):
    """The arguments of a graph's kernel: [(how it is read, name)], outputs by their places."""
    (body,) = re.findall(rf"struct {name}Arguments : {name} {{(.*?)^}};", source, re.M | re.S)
    (function,) = re.findall(r'kAclnn = "(\w+)"', body)
    return function, re.findall(r"c\.(\w+)\((\w+)\)", body)


def test_every_operator_is_bound_once():
    assert set(BOUND) == {f.operator for f in RECORDED.values()}
    assert len(BOUND) == len(set(BOUND.values())) == len(RECORDED)


@FUNCTIONS
def test_a_graph_has_the_parameters_of_torch(function):
    assert parameters(BOUND[function.operator]) == [a.name for a in schema_of(function)]


def wanted_of(function):
    outputs = iter(range(len(function.arguments)))
    for a in function.arguments:
        if a.kind == "out":
            yield ("Out",), str(next(outputs))
        elif a.name.endswith("_stride"):
            yield ("Stride",), a.name.removesuffix("_stride")
        else:
            yield GETTERS[a.kind], a.name


@FUNCTIONS
def test_a_graphs_kernel_hands_over_arguments_as_recorded(function):
    name, given = handed_over(KERNELS, BOUND[function.operator])
    assert name == function.name
    wanted = list(wanted_of(function))
    assert [n for _, n in given] == [n for _, n in wanted]
    assert all(how in ways for (how, _), (ways, _) in zip(given, wanted, strict=True))
    # Absent lengths are empty for the metadata operators, absent tensors null for the others.
    of_tensors = {how for how, _ in given if how in GETTERS["tensor"]}
    assert of_tensors == ({"OrEmpty"} if function.name.endswith("Metadata") else {"In"})


def test_a_swapped_argument_of_a_graph_is_noticed():
    swapped = KERNELS.replace(
        "c.Float(hc_eps), c.Float(norm_eps)", "c.Float(norm_eps), c.Float(hc_eps)"
    )
    assert swapped != KERNELS
    wanted = [n for _, n in wanted_of(RECORDED["aclnnHcPre"])]
    assert [n for _, n in handed_over(swapped, "HcPre")[1]] != wanted


@FUNCTIONS
def test_a_definition_says_what_the_schema_says(function):
    ((name, text),) = yaml.safe_load(graph.definition(function.operator)).items()
    assert name == function.operator
    schema = schema_of(function)
    assert list(text["args"]) == [a.name for a in schema]
    for a in schema:
        kind = str(a.type)
        said = text["args"][a.name]
        assert said["dtype"] == kind.removeprefix("Optional[").rstrip("]").lower()
        if kind.startswith("Optional"):
            assert said["default"] == "None"
        elif a.has_default_value():
            value = a.default_value
            assert said["default"] == (f"'{value}'" if isinstance(value, str) else value)
        else:
            assert said.get("default", 0) == 0  # which no operator takes for these
    assert list(text["returns"]) == [a.name for a in function.arguments if a.kind == "out"]
    writes = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
    assert text.get("args_signature", {}).get("rw_write", "").split() == writes
    assert bool(writes) == ("side_effect_mem" in text.get("labels", {}))


def _cpp(value):
    """An argument as C++ of shapes.h: a shape, a number or a name."""
    if isinstance(value, T):
        return f"Shape{{{', '.join(map(str, value.shape))}}}"
    return {True: "true", False: "false"}.get(
        value, f'"{value}"' if isinstance(value, str) else value
    )


# The functions of shapes.h, and which of the call's arguments they take.
SHAPES = {
    "HcPre": ("HcPreShapes", ["x", "hc_mult"]), "HcPost": ("HcPostShapes", ["residual"]),
    "Compressor": ("CompressorShapes", ["x", "norm_weight", "rope_sin", "cmp_ratio"]),
    "SparseAttnSharedkv": ("AttentionShapes", ["q", "return_softmax_lse"]),
    "KvQuantSparseAttnSharedkv": ("AttentionShapes", ["q", "return_softmax_lse"]),
    "SparseAttnSharedkvMetadata": ("MetadataShapes", []),
    "KvQuantSparseAttnSharedkvMetadata": ("MetadataShapes", []),
    "QuantLightningIndexerMetadata": ("MetadataShapes", []),
    "QuantLightningIndexer": (
        "IndexerShapes", ["query", "key", "layout_key", "sparse_count", "return_value"],
    ),
    "MoeGatingTopKHash": ("GateShapes", ["x", "k"]),
}  # fmt: skip


def test_shapes_are_those_of_the_meta_kernels(tmp_path):
    """One program prints what shapes.h says of every call."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the package's own kernels are built with it"
    assert set(CALLS) == set(BOUND)
    lines, wanted = [], []
    for operator, calls in CALLS.items():
        function, takes = SHAPES[BOUND[operator]]
        for arguments in calls:
            named = dict(zip(parameters(BOUND[operator]), arguments, strict=True))
            lines.append(f"show({function}({', '.join(str(_cpp(named[n])) for n in takes)}));")
            wanted.append([list(shape) for shape, _ in returned(operator, arguments)])
    lines.append("show(CompressorShapes({2, kUnknown, 64}, {512}, {kUnknown, 64}, 4));")
    wanted.append([[2, -1, 512]])  # of a chunk whose length a graph does not know
    source = tmp_path / "shapes.cc"
    source.write_text(
        '#include <cstdio>\n#include "shapes.h"\nusing namespace v4_ascend;\n'
        "void show(const Shapes &all) {\n  for (auto &s : all) {\n"
        '    std::printf(";"); for (auto n : s) std::printf(" %ld", (long)n);\n  }\n'
        '  std::printf("\\n");\n}\n' + "int main() {\n" + "\n".join(lines) + "\n}\n"
    )
    program = tmp_path / "shapes"
    subprocess.run([compiler, "-std=c++17", f"-I{FOLDER}", source, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    got = [[[int(n) for n in s.split()] for s in line.split(";")[1:]] for line in said.splitlines()]
    assert got == wanted
