"""The aclnn bindings where MindSpore is and CANN is not: refused, and of correct syntax."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from mindspore.ops import CustomOpBuilder

from v4_ascend.backends.mindspore import aclnn
from v4_ascend.errors import BackendUnavailableError

FOLDER = Path(aclnn.__file__).parent
STUB = Path(__file__).parent / "cann_stub"  # the declarations of CANN that MindSpore's headers use


@pytest.fixture
def command(monkeypatch):
    """The compiler call of MindSpore's own builder, with our stub where CANN would be."""
    monkeypatch.setenv("ASCEND_OPP_PATH", "/nowhere/opp")
    builder = CustomOpBuilder(aclnn.NAME, aclnn.SOURCES[0], backend="Ascend")
    flags = [f for f in builder.get_cflags() if f not in ("-pie", "-O2")]
    python = sysconfig.get_paths()["include"]
    folders = [*builder.get_include_paths(), python, str(STUB), str(FOLDER)]
    return ["g++", "-fsyntax-only", "-w", "-fmax-errors=5", *flags, *(f"-I{f}" for f in folders)]


@pytest.fixture
def sources(tmp_path):
    """All sources as one: MindSpore's headers take longer than ours."""
    together = tmp_path / "all.cc"
    together.write_text("\n".join((FOLDER / name).read_text() for name in aclnn.SOURCES))
    return together


def test_loading_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("ASCEND_OPP_PATH", raising=False)
    with pytest.raises(BackendUnavailableError, match="ASCEND_OPP_PATH is not set") as e:
        aclnn.load()
    assert e.value.exit_code == 4


def test_loading_says_which_operator_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("ASCEND_OPP_PATH", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    with pytest.raises(BackendUnavailableError, match="no operator package declares aclnnHcPre"):
        aclnn.load()


def test_the_source_is_cpp_that_mindspores_headers_accept(command, sources):
    """All of it but CANN: the types of every call into MindSpore, and every template in it."""
    done = subprocess.run([*command, str(sources)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_calls_that_mindspore_would_not_take_are_noticed(command, sources):
    text = sources.read_text()
    for right, wrong in (
        ("runner->Run(present, outputs)", "runner->Run()"),
        ("GetShapeVector()", "GetShapes()"),
    ):
        assert right in text
        text = text.replace(right, wrong)
    sources.write_text(text)
    done = subprocess.run([*command, str(sources)], capture_output=True, text=True, check=False)
    assert "no matching function for call" in done.stderr
    assert "has no member named ‘GetShapes’" in done.stderr
