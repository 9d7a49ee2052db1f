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
