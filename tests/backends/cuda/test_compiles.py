"""Every kernel, in every specialisation Flash and Pro launch, compiles to a cubin without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from v4_ascend.backends.cuda import limits as cuda
from v4_ascend.backends.triton import limits as shared

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "backends"
MODULES = {"triton": shared.MODULES, "cuda": cuda.MODULES}
SHARED_BYTES = {90: 232_448, 100: 232_448}  # a block may use: CUDA programming guide, appendix


def _compiled(sm, folder, module):
    script, ops = str(HERE / "compile_sm.py"), MODULES[folder][module]
    command = [sys.executable, script, str(sm), folder, *ops]
    # Not interpreted, whatever this process does.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sm", "folder", "module"),
    [
        *((90, folder, m) for folder, modules in MODULES.items() for m in modules),
        (100, "triton", "attention"),
        (100, "triton", "gemm"),
    ],
)
def test_every_specialisation_compiles(sm, folder, module):
    made = _compiled(sm, folder, module)
    assert [f"{m['name']}: {m['error']}" for m in made if "error" in m] == []
    assert all(m["cubin"] > 0 for m in made)
    too_much = [m["name"] for m in made if m["shared"] > SHARED_BYTES[sm]]
    assert too_much == []
    launched = set(
        re.findall(r"^ +(_\w+)\[", (SOURCES / folder / f"{module}.py").read_text(), re.M)
    )
    assert launched <= {m["kernel"] for m in made}, "a kernel that no real width launches"


def test_shared_sources_have_no_inline_assembly():
    """Lowering for Ascend lets PTX through, and no Ascend device could run it."""
    kernels = set((SOURCES / "triton").glob("*.py")) - {SOURCES / "triton" / "interpreter.py"}
    for source in kernels:
        text = source.read_text()
        for word in ("inline_asm", "libdevice", "asm_elementwise", "tl.extra.cuda"):
            assert word not in text, f"{source.name}: {word}"
