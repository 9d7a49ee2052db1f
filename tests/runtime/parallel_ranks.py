"""One rank of several plans in turn: ``python parallel_ranks.py FOLDER RANK``. Run by tests.

FOLDER has cases.json: for each case a plan, a port, and steps; a step has for each DP group its
[slot, token ids, start]. The last stage writes FOLDER/CASE-dpN.pt.
"""

import json
import os
import sys
from pathlib import Path

import torch

from v4_ascend.ops import use_policy
from v4_ascend.runtime.comm import joined
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.flight import Flight
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.supernode.plan import Plan


def run(plan, rank, steps):
    with joined(plan, rank, torch.device("cpu"), Flight()) as groups:
        read = [0]

        def progress(done, total):
            read[:] = [done, total]

        with use_policy(kernels=plan.kernels):
            engine = Engine.load(plan, progress, groups)
            logits = []
            for step in steps:
                chunks = [Chunk(*c) for c in step[groups.dp_rank]]
                logits.append(engine.logits(chunks))
        weights = {
            t.data_ptr(): t.numel() for b in engine.model.layers for t in tensors(b.ffn.experts)
        }
        facts = {
            "read": read,
            "expert_values": sum(weights.values()),
            "load": [b.ffn.load.tolist() for b in engine.model.layers],
            "bytes_sent": groups.flight.bytes_sent,
        }
        return groups, logits, facts


def tensors(experts):
    for linear in (experts.w13, experts.w2):
        yield linear.weight


def main(folder, rank):
    torch.set_num_threads(1)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        plan = Plan.model_validate(case["plan"])
        if rank >= plan.parallel.world_size:
            continue
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(case["port"])}
        groups, logits, facts = run(plan, rank, case["steps"])
        (folder / f"{name}-rank{rank}.json").write_text(json.dumps(facts))
        is_last = groups.following is None
        if is_last and groups.tp.rank == groups.cp.rank == 0:
            torch.save(logits, folder / f"{name}-dp{groups.dp_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
