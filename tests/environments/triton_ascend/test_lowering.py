"""Our Triton kernels, as Flash and Pro launch them, lower to Linalg for Atlas A2 and A3.

That is as far as triton-ascend's own wheel goes: see `lower.py` for what it does not prove.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from v4_ascend.backends.triton.limits import MODULES
from v4_ascend.backends.triton.paged import CODES

HERE = Path(__file__).parent
CHIPS = ("Ascend910B3", "Ascend910_9391")  # A2, A3
CHIP_950 = "Ascend950PR_9579"  # switched off in this wheel: what it says is reported, not asserted


@dataclass(frozen=True)
class Stop:
    """A kernel that does not lower.

    Attributes:
        kernel, record: which; a record is a cache format, None if the kernel has none.
        after: the last form it reached.
        says: a part of the compiler's message.
        reason: what in the kernel it is about.
    """

    kernel: str
    record: str | None
    after: str
    says: str
    reason: str

    def is_of(self, line):
        mark = "" if self.record is None else f"RECORD={CODES[self.record]},"
        return line["kernel"] == self.kernel and mark in line["name"].replace("]", ",")


_EVERY_SECOND = "stores to every second channel, which the pass takes for an interleave it lacks"
_SAME_SCALE = "all channels of a group load the same scale: a block of stride zero"
_PAIRED = "pairs of bytes are joined to bf16: loads of every second byte in masked tiles"
_CRASH = "PLEASE submit a bug report"  # in InterleaveOptimization.cpp; its assertion varies
# Of triton-ascend 3.2.0, on every chip of CHIPS.
STOPS = (
    Stop("_rope", None, "ttir", _CRASH, _EVERY_SECOND),
    Stop("_sparse_attn", "fp8_584", "ttir", _CRASH, _PAIRED),
    Stop("_sparse_attn", "fp8_640", "ttir", _CRASH, _PAIRED),
    Stop("_store_kv", "fp8_584", "ttir", "strides must not be zero", _SAME_SCALE),
    Stop("_store_kv", "fp8_640", "ttir", "strides must not be zero", _SAME_SCALE),
    Stop("_index_scores", "fp8_132", "ttir", "strides must not be zero", _SAME_SCALE),
)


def _lowered(chip, module, folder):
    command = [sys.executable, str(HERE / "lower.py"), chip, *MODULES[module]]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder)}  # a cached kernel would be lowered no more
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, "nothing was launched"
    return lines


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("module", MODULES)
def test_what_lowers_and_what_does_not_is_as_listed(chip, module, tmp_path):
    lines = _lowered(chip, module, tmp_path)
    found = set()
    for line in lines:
        stops = [s for s in STOPS if s.is_of(line)]
        if not stops:
            assert line["stage"] == "linalg", f"{line['name']}: not listed, {line['error']}"
            continue
        (stop,) = stops
        assert line["stage"] != "linalg", f"{line['name']} lowers now: take it off the list"
        assert line["stage"] == stop.after, f"{line['name']}: {line['error']}"
        assert stop.says in line["error"], f"{line['name']}: {line['error']}"
        found.add(stop)
    assert found == {s for s in STOPS if any(s.kernel == line["kernel"] for line in lines)}


def test_every_listed_kernel_exists(tmp_path):
    from importlib import import_module

    modules = [import_module(f"v4_ascend.backends.triton.{m}") for m in MODULES]
    for stop in STOPS:
        assert any(hasattr(m, stop.kernel) for m in modules), stop.kernel
        assert len(stop.reason.split()) > 5


def test_a_kernel_that_cannot_be_lowered_is_told_from_one_that_can(tmp_path):
    """Without this, a script that reports success for everything would pass."""
    source = tmp_path / "one.py"
    source.write_text(
        "import triton, triton.language as tl\n"
        "@triton.jit\n"
        "def good(x, N: tl.constexpr):\n"
        "    at = x + tl.arange(0, N)\n"
        "    tl.store(at, tl.load(at) + 1.0)\n"
        "@triton.jit\n"
        "def bad(x, N: tl.constexpr):\n"
        "    tl.store(x + tl.arange(0, N), no_such_name)\n"
    )
    program = (
        "import sys, json; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "import one, lower\n"
        "from launches import Launch\n"
        "kinds = (('x', '*fp32'), ('N', 'constexpr'))\n"
        "fake = {n: Launch(getattr(one, n), kinds, (('N', 64),), ()) for n in ('good', 'bad')}\n"
        "lower.launches_of = lambda name: [fake[name]]\n"
        "sys.argv = ['lower.py', 'Ascend910B3', 'good', 'bad']\n"
        "lower.main()\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, str(tmp_path), str(HERE)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = {x["kernel"]: x["stage"] for x in map(json.loads, done.stdout.splitlines())}
    assert stages == {"bad": "python", "good": "linalg"}


@pytest.mark.slow
def test_the_950_is_reported(tmp_path, capsys):
    lines = [x for m in MODULES for x in _lowered(CHIP_950, m, tmp_path)]
    with capsys.disabled():
        for line in lines:
            if line["stage"] != "linalg":
                print(f"{CHIP_950}: {line['name']} stops after {line['stage']}")  # noqa: T201
    assert {line["chip"] for line in lines} == {CHIP_950}
