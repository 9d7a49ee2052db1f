"""The aclnn operators in MindSpore's graphs, on its CPU target: its compiler traces each of them.

That is as far as a machine without CANN goes: there are no kernels to run. Building the
definitions takes some fifteen seconds of a core.
"""

from pathlib import Path

import mindspore as ms
import pytest
from aclnn_calls import CALLS, T, returned
from mindspore.ops import CustomOpBuilder

from v4_ascend.backends.mindspore import aclnn
from v4_ascend.backends.mindspore.aclnn import graph
from v4_ascend.backends.mindspore.aclnn.interface import recorded

pytestmark = pytest.mark.slow
# In place of v4_ops.cc, which only an Ascend build can compile: names, and nothing behind them.
NO_FUNCTIONS = """#include <pybind11/pybind11.h>
PYBIND11_MODULE(MS_EXTENSION_NAME, m) {{
{}
}}
"""


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    stub = folder / "stub.cc"
    named = "\n".join(f'  m.def("{f.operator}", [] {{}});' for f in recorded().values())
    stub.write_text(NO_FUNCTIONS.format(named))
    source = Path(aclnn.__file__).with_name("v4_graph.cc")
    return CustomOpBuilder(
        "v4_ascend_graphs", [str(source), str(stub)], backend="CPU", cflags="-O0",
        ldflags=aclnn.CORE, op_def=graph.write_definitions(folder / "definitions"),
        build_dir=str(folder / "build"),
    ).load()  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """Where a graph is refused, MindSpore writes it to a folder of the present one."""
    monkeypatch.chdir(tmp_path)


class Asked(ms.nn.Cell):
    """A graph of one operator, and what is known of its outputs when it is compiled."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def construct(self, *arguments):
        out = self.operator(*arguments)
        outs = out if isinstance(out, tuple) else (out,)
        return tuple([o.shape for o in outs]), tuple([o.dtype for o in outs])


class Checked(ms.nn.Cell):
    """A graph of one operator, refused when it is compiled if its output has another shape."""

    def __init__(self, operator, shape):
        super().__init__()
        self.operator, self.shape = operator, shape

    def construct(self, *arguments):
        out = self.operator(*arguments)
        if out.shape != self.shape:
            raise ValueError("another shape")
        return out


def compiled(net, arguments):
    given = [
        ms.ops.zeros(a.shape, getattr(ms, str(a.dtype).removeprefix("torch.")))
        if isinstance(a, T)
        else a
        for a in arguments
    ]
    net.set_jit_config(ms.JitConfig(jit_level="O0"))  # kernel by kernel, as aclnn's are run
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        return net(*given)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


CASES = [
    pytest.param(o, c, id=f"{o}-{i}") for o, calls in CALLS.items() for i, c in enumerate(calls)
]
PURE = [c for c in CASES if c.values[0] not in graph.WRITES]
WRITING = [c for c in CASES if c.values[0] in graph.WRITES]


@pytest.mark.parametrize(("operator", "arguments"), PURE)
def test_a_graph_knows_shapes_and_dtypes(operators, operator, arguments):
    shapes, dtypes = compiled(Asked(getattr(operators, operator)), arguments)
    wanted = returned(operator, arguments)
    assert [tuple(s) for s in shapes] == [shape for shape, _ in wanted]
    assert [str(d).lower().removeprefix("mindspore.") for d in dtypes] == [
        str(d).removeprefix("torch.") for _, d in wanted
    ]


@pytest.mark.parametrize(("operator", "arguments"), WRITING)
def test_a_graph_orders_what_writes(operators, operator, arguments):
    """The call has a place among side effects, and no kernel on the CPU."""
    ((shape, _),) = returned(operator, arguments)
    net = Checked(getattr(operators, operator), shape)
    with pytest.raises(RuntimeError, match=rf"Unsupported op \[Custom_{operator}\] on CPU") as e:
        compiled(net, arguments)
    assert "UMonad" in str(e.value)
    with pytest.raises(ValueError, match="another shape"):
        compiled(Checked(getattr(operators, operator), (*shape, 1)), arguments)
