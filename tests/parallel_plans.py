"""Plans of a tiny model in any layout, and the processes that run them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import ParallelConfig, load_topology
from v4_ascend.supernode.experts import place_layer
from v4_ascend.supernode.plan import Rank, plan_of
from v4_ascend.supernode.stages import balance

SCRIPT = Path(__file__).with_name("runtime") / "parallel_ranks.py"
TINY = ModelConfig.read(preset_path("tiny"))
RAGGED = ((90, 3), (7, 50), (1, 1), (1, 0), (33, 1), (0, 0), (1, 1))  # tokens of each slot


def make_plan(checkpoint, layout, **changes):
    p = ParallelConfig(**layout)
    config = ModelConfig.read(checkpoint)
    topology = load_topology(
        "laptop",
        [f"model.checkpoint={checkpoint}", "serve.max_model_len=256", "runtime.dtype=fp32"],
    )
    stages = balance([1.0] * config.n_layers, p.pp_size)
    share = config.n_routed_experts // p.ep_size
    ranks = []
    for rank in range(p.world_size):
        stage, within = divmod(rank, p.stage_size)
        first = within % p.ep_size * share
        ranks.append(
            Rank(rank=rank, host="here", layers=stages[stage], experts=(first, first + share))
        )
    placement = None
    if p.n_redundant_experts:
        counts = [100 - 9 * e for e in range(config.n_routed_experts)]
        placement = (place_layer(counts, p.ep_size, p.n_redundant_experts),) * config.n_layers
    plan = plan_of(topology, p, tuple(ranks), placement=placement)
    few = {"quant_sim": "off", "max_batch_size": 2 * p.dp_size, "max_chunk": 96, **changes}
    return plan.model_copy(update=few)


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


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(folder, plans, n_ranks, timeout=240, ragged=RAGGED):
    cases = {
        name: {
            "plan": json.loads(plan.model_dump_json()),
            "port": free_port(),
            "steps": steps_of(plan.parallel.dp_size, ragged),
        }
        for name, plan in plans.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"V4_ASCEND_COMM_TIMEOUT": "60", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
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
    return cases
