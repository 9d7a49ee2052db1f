"""Lower what the operators named on the command line launch to Linalg, for a chip not here.

    python lower.py Ascend910B3 rms_norm ...      one JSON line a specialisation

Runs triton-ascend's own passes: Python to Triton IR ("ttir"), that to Linalg ("linalg"), the
last form whose compiler is in its wheel. What makes a binary of Linalg is part of CANN, so
reaching it is necessary for a kernel to run, and does not prove that it does.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from launches import launches_of
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Triton loads backends as module objects of its own; patching `triton.backends.ascend` misses.
COMPILER = backends["ascend"].compiler
BEFORE_950 = "is_compile_on_910_95"  # a constant of the wheel that switches the 950 off


class _NoDevice:
    """What lowering asks of a driver."""

    def __init__(self, chip):
        self.chip, self.utils = chip, self

    def get_arch(self):
        return self.chip

    def get_device_properties(self, device):
        return {"max_shared_mem": 1, "num_aicore": 24, "num_vectorcore": 48}

    def get_current_target(self):
        return GPUTarget("npu", self.chip, 0)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


class _LoweredError(Exception):
    """Raised where the wheel's part ends."""


def _stop_at_linalg(reached):
    original = COMPILER.add_stages

    def add_stages(self, stages, options):
        original(self, stages, options)
        first, second = stages["ttir"], stages["ttadapter"]

        def ttir(source, metadata):
            made = first(source, metadata)
            reached.append("ttir")
            return made

        def linalg(source, metadata):
            second(source, metadata)
            reached.append("linalg")
            raise _LoweredError

        stages["ttir"], stages["ttadapter"] = ttir, linalg

    COMPILER.add_stages = add_stages


def main():
    chip = sys.argv[1]
    is_950 = "950" in chip
    driver = _NoDevice(chip)
    COMPILER.add_stages.__globals__["NPUUtils"] = lambda: driver
    if is_950:
        for module in list(sys.modules.values()):
            if getattr(module, BEFORE_950, None) is False:
                setattr(module, BEFORE_950, True)
    triton.runtime.driver.set_active(driver)
    reached = []
    _stop_at_linalg(reached)
    for launch in sorted({x for op in sys.argv[2:] for x in launches_of(op)}, key=lambda x: x.name):
        reached[:] = ["python"]
        line = {"name": launch.name, "kernel": launch.fn.__name__, "chip": chip, "error": ""}
        source = ASTSource(launch.fn, dict(launch.signature), dict(launch.constants))
        try:
            options = {"compile_on_910_95": is_950}
            triton.compile(source, target=driver.get_current_target(), options=options)
        except Exception as e:  # noqa: BLE001  # whatever stops a kernel is the list's business
            if reached[-1] != "linalg":  # else it is ours, in the compiler's wrapping
                line["error"] = " ".join(f"{type(e).__name__}: {e}".split())
        print(json.dumps(line | {"stage": reached[-1]}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
