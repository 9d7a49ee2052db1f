"""Compile what the operators named on the command line launch, for a GPU that need not be here.

python compile_sm.py 90 triton sparse_attn ...      one JSON line a specialisation
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from launches import launches_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from v4_ascend.backends.cuda import device


def main():
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    launches = set()
    for device.INTERPRETED in (1, 132):  # work in one part, and in many
        launches |= {x for op in sys.argv[3:] for x in launches_of(op, sys.argv[2])}
    for launch in launches:
        source = ASTSource(launch.fn, dict(launch.signature), dict(launch.constants))
        line = {"name": launch.name, "kernel": launch.fn.__name__}
        try:
            made = triton.compile(source, target=target, options=dict(launch.options))
            line |= {"cubin": len(made.asm["cubin"]), "shared": made.metadata.shared}
        except Exception as e:  # noqa: BLE001  # whatever stops a kernel is its test's failure
            line["error"] = f"{e} {e.__cause__ or ''}"
        print(json.dumps(line), flush=True)  # noqa: T201  # read by the test


if __name__ == "__main__":
    main()
