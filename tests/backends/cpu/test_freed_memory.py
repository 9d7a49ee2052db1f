"""Memory that a step gives back stays with the process."""

import resource
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from v4_ascend.backends import CPU
CPU.use_chip(None)
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24).sum()  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults = [step() for _ in range(16)]
print(faults[0], min(faults))
"""


@pytest.mark.parametrize("tuned", [{}, {"MALLOC_ARENA_TEST": "8"}])
def test_freed_memory_stays_unless_the_environment_tunes_malloc(tuned):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={"PATH": "/usr/bin:/bin"} | tuned,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # How many steps the heap takes to find room for an aligned tensor depends on its addresses.
    first, least = map(int, done.stdout.split())
    pages = (1 << 26) // resource.getpagesize()
    assert first > pages // 600  # of 2 MiB, where the system gives such
    assert (least < first // 10) is not bool(tuned)


GIVES_BACK = """
import torch
from pathlib import Path
from v4_ascend.backends import CPU
from v4_ascend.backends.cpu.memory import give_back_freed_memory
def held():
    return int(Path("/proc/self/statm").read_text().split()[1])
CPU.use_chip(None)
pieces = [torch.ones(1 << 22) for _ in range(16)]  # 256 MiB
kept = torch.ones(1)
del pieces
before = held()
give_back_freed_memory()
print(before - held())
"""


def test_what_was_freed_can_be_given_back():
    done = subprocess.run(
        [sys.executable, "-c", GIVES_BACK], env={"PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) > (200 << 20) // resource.getpagesize()
