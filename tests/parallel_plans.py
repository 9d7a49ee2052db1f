"""Plans of a tiny model in any layout, and the processes that run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path

SCRIPT = Path(__file__).with_name("runtime") / "parallel_ranks.py"
# Two suites on two cores keep a rank waiting for longer than a minute.
ENVIRONMENT = {"V4_ASCEND_COMM_TIMEOUT": "180", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
TINY = ModelConfig.read(preset_path("tiny"))
RAGGED = ((90, 3), (7, 50), (1, 1), (1, 0), (33, 1), (0, 0), (1, 1))  # tokens of each slot


def steps_of(n_dp, ragged=RAGGED):
    """Prefill, chunks, decode, ragged batches; the second DP group is idle at times.

    A group has the same sequences however many there are.
    """
    of_group = [torch.Generator().manual_seed(5 + dp) for dp in range(n_dp)]
    steps, done = [], {}
    for number, sizes in enumerate(ragged):
        step = []
        for dp in range(n_dp):
            chunks = []
            for slot, size in enumerate(sizes):
                if not size or (dp == 1 and number in (1, 3)):
                    continue
                ids = torch.randint(0, TINY.vocab_size, (size,), generator=of_group[dp]).tolist()
                chunks.append([slot, ids, done.get((dp, slot), 0)])
                done[dp, slot] = chunks[-1][2] + size
            step.append(chunks)
        steps.append(step)
    return steps


def run_ranks(folder, plans, n_ranks, timeout=240, ragged=RAGGED):
    cases = {
        name: {
            "plan": json.loads(plan.model_dump_json()),
            "store": str(folder / f"{name}.store"),
            "steps": steps_of(plan.parallel.dp_size, ragged),
        }
        for name, plan in plans.items()
    }
    launch(SCRIPT, folder, cases, n_ranks, timeout)
    return cases


def launch(script, folder, cases, n_ranks, timeout=240):
    """Run a script for each rank, with the cases in a file of the folder."""
    (folder / "cases.json").write_text(json.dumps(cases))
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        for rank in range(n_ranks)
    ]
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    failed = {r: out[-1500:] for r, out in enumerate(outputs) if processes[r].returncode}
    assert not failed, "\n".join(f"rank {r}: {text}" for r, text in failed.items())
