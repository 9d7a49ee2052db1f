"""The aclnn bindings where MindSpore is and CANN is not: refused, and of correct syntax."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from mindspore.ops import CustomOpBuilder

from v4_ascend.backends.mindspore import aclnn
from v4_ascend.errors import BackendUnavailableError

SOURCE = Path(aclnn.__file__).with_name("v4_ops.cc")
STUB = Path(__file__).parent / "cann_stub"  # the declarations of CANN that MindSpore's headers use


@pytest.fixture
def command(monkeypatch):
    """The compiler call of MindSpore's own builder, with our stub where CANN would be."""
    monkeypatch.setenv("ASCEND_OPP_PATH", "/nowhere/opp")
    builder = CustomOpBuilder(aclnn.NAME, str(SOURCE), backend="Ascend")
    flags = [f for f in builder.get_cflags() if f not in ("-pie", "-O2")]
    folders = [*builder.get_include_paths(), sysconfig.get_paths()["include"], str(STUB)]
    return ["g++", "-fsyntax-only", "-w", *flags, *(f"-I{f}" for f in folders)]


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


def test_the_source_is_cpp_that_mindspores_headers_accept(command):
    """All of it but CANN: the types of every call into MindSpore, and every template in it."""
    done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_call_that_mindspore_would_not_take_is_noticed(command, tmp_path):
    wrong = tmp_path / "wrong.cc"
    wrong.write_text(SOURCE.read_text().replace("runner->Run(present, outputs)", "runner->Run()"))
    done = subprocess.run([*command, str(wrong)], capture_output=True, text=True, check=False)
    assert "no matching function for call" in done.stderr
