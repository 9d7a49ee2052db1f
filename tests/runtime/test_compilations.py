"""Kernels that are compiled while a rank serves are counted and named."""

import pytest
import triton

from v4_ascend.backends import BACKENDS
from v4_ascend.backends.triton.registry import watch_compilations
from v4_ascend.runtime.compilations import Compilations


@pytest.fixture
def hook(monkeypatch):
    """Where Triton looks for somebody to tell, empty again afterwards."""
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", None)
    return triton.knobs.runtime


def test_a_compiled_kernel_is_counted_and_named(hook, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    compilations = Compilations(3)
    BACKENDS["cuda"].watch_compilations(compilations.add)
    assert hook.jit_post_compile_hook(key=1, repr="_gemm[16]", fn=None, compile={}) is None
    assert compilations.n == 1
    assert "rank 3: compiled while serving: _gemm[16]" in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled(hook, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    watch_compilations(pytest.fail)
    assert hook.jit_post_compile_hook is None
