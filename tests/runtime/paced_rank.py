"""A rank whose work takes as long as told: ``python paced_rank.py STATE RANK LAYER_S TAIL_S``.

Run by tests. A layer of a step that has computed for less than LAYER_S seconds sleeps for the rest,
and so does what draws tokens for TAIL_S: the ranks of a small machine then keep each other from
nothing, as devices do. After each step the rank adds to STATE/rankN.jsonl when it began, and the
seconds it had waited until then.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from v4_ascend.model.block import Block
from v4_ascend.runtime import worker
from v4_ascend.runtime.engine import Engine


def paced(compute, seconds):
    def slow(*args, **kwargs):
        began = time.perf_counter()
        x = compute(*args, **kwargs)
        time.sleep(max(0.0, seconds - (time.perf_counter() - began)))
        return x

    return slow


def noted(run, file, layer):
    def step(self, of, **how):
        Block.__call__ = layer  # from the first step on: the canary need not take so long
        began, waited = time.perf_counter(), dict(self.groups.flight.waited_s)
        result = run(self, of, **how)
        with file.open("a") as f:
            f.write(json.dumps([began, waited]) + "\n")
        return result

    return step


def main(state, rank, layer_s, tail_s):
    torch.set_num_threads(1)
    layer = paced(Block.__call__, float(layer_s))
    draw, slow_draw = Engine._draw, paced(Engine._draw, float(tail_s))
    Engine._draw = lambda self, *args: (slow_draw if self.answers else draw)(self, *args)
    Engine.step = noted(Engine.step, Path(state) / f"rank{rank}.jsonl", layer)
    os.environ |= {"LOCAL_RANK": rank, "V4_ASCEND_HOST": "here"}
    sys.argv = [sys.argv[0], state]
    worker.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
