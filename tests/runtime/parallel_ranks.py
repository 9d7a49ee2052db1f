"""One rank of several plans in turn: ``python parallel_ranks.py FOLDER RANK``. Run by tests.

FOLDER has cases.json: for each case a plan, the file where ranks meet, and steps; a step has for
each DP group its [slot, token ids, start]. The last stage writes FOLDER/CASE-dpN.pt, each rank its
facts. Plans of an emulated NPU run on one: all of a folder are then of the same chip.

Behind these steps, whose logits count, comes one that is served: every sequence draws a token.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from v4_ascend import emulation
from v4_ascend.backends import find_backend
from v4_ascend.checkpoint.read_ahead import ReadAhead
from v4_ascend.model import moe
from v4_ascend.model.resident import resident_bytes
from v4_ascend.ops import moe_combine, use_policy
from v4_ascend.runtime import load as loading
from v4_ascend.runtime.comm import joined
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.flight import Flight
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.runtime.link import STORE
from v4_ascend.runtime.messages import Sampling, SequenceStep, Step
from v4_ascend.supernode.plan import Plan

sys.path.append(str(Path(__file__).parents[1]))
from planting import planted_kernel  # noqa: E402
from wire import carried  # noqa: E402

GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0)


def run(plan, rank, steps):
    if plan.emulated:
        emulation.install(plan.chip)
        emulation.reset_calls()
    device = torch.device(find_backend(plan.backend, "plan.backend").device())
    with joined(plan, rank, device, Flight()) as groups:
        read, by_process = [0], []

        def progress(done, total):
            read[:] = [done, total]
            by_process[1:] = [(done, bytes_read_by_process())]

        class Noting(ReadAhead):
            def __init__(self, *args):
                by_process[:] = [(0, bytes_read_by_process())]
                super().__init__(*args)

        with (
            patch.object(loading, "ReadAhead", Noting),
            use_policy(backend=plan.backend, kernels=plan.kernels),
        ):
            engine = Engine.load(plan, progress, groups)
            routed = [] if plan.emulated else noted_routing(groups.ep)
            with sums(plan):
                logits = [on_cpu(engine, step[groups.dp_rank]) for step in steps]
            sent = +groups.flight.bytes_sent
            load = [b.ffn.load.tolist() for b in engine.model.layers]
            if not plan.emulated:
                engine.step(decoding(steps, engine.n_slots))
        facts = {
            "read": read,
            "read_by_process": by_process,
            "resident": resident_bytes(engine.model),
            "load": load,
            "bytes_sent": sent,
            "bytes_sent_decoding": groups.flight.bytes_sent - sent,
            "routed": routed,
        }
        if plan.emulated:
            facts |= emulated_facts(groups)
        else:
            groups.barrier()  # streams of the last step have arrived by now
            facts["wire"] = {name: carried(groups, group) for name, group in named(groups)}
        return groups, logits, facts


def bytes_read_by_process():
    """Return what this process has read so far by system calls, whatever it was."""
    with open("/proc/self/io") as f:
        return int(f.readline().removeprefix("rchar:"))


def named(groups):
    return [(n, g) for n in ("tp", "cp", "ep") if (g := getattr(groups, n)).size > 1]


def decoding(steps, n_slots):
    """One more token of every sequence; slots are numbered over all DP groups."""
    so_far = {}
    for step in steps:
        for dp, chunks in enumerate(step):
            for slot, ids, start in chunks:
                so_far[dp * n_slots + slot] = start + len(ids)
    sequences = [
        SequenceStep(request=slot, slot=slot, token_ids=[1], start=start, sampling=GREEDY)
        for slot, start in sorted(so_far.items())
    ]
    return Step(len(steps), sequences)


def noted_routing(group):
    """Note of every dispatch how many tokens, and choices of them, go to each rank."""
    routed, dispatch = [], moe.moe_dispatch

    def noting(x, ids, weights, n_experts, ep, fp8):
        to = torch.nn.functional.one_hot(ids.cpu() // (n_experts // ep.size), ep.size)
        routed.append([(to.sum(1) > 0).sum(0).tolist(), to.sum((0, 1)).tolist()])
        return dispatch(x, ids, weights, n_experts, ep, fp8)

    moe.moe_dispatch = noting if group.size > 1 else dispatch
    return routed


def on_cpu(engine, chunks):
    found = engine.logits([Chunk(*c) for c in chunks])
    return None if found is None else found.cpu()


def sums(plan):
    """Let a lone emulated rank round the experts' sums to bf16, as the fused combine does."""
    if not plan.emulated or plan.parallel.world_size > 1:
        return nullcontext()

    def rounded(rows, source, topk, tokens_per_rank, group):
        return moe_combine.reference(rows, source, topk, tokens_per_rank, group).bfloat16().float()

    return planted_kernel(moe_combine, "ascend", rounded)


def emulated_facts(groups):
    from v4_ascend.emulation import collectives

    return {
        "groups": collectives.asked(),
        "hccl_name": groups.ep.hccl_name,
        "calls": emulation.calls("npu") | emulation.calls("_C_ascend") | emulation.calls("c10d"),
        "device": str(torch.empty(1, device="npu").device),
    }


def main(folder, rank):
    torch.set_num_threads(1)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        plan = Plan.model_validate(case["plan"])
        if rank >= plan.parallel.world_size:
            continue
        os.environ[STORE] = f"file://{case['store']}"
        groups, logits, facts = run(plan, rank, case["steps"])
        (folder / f"{name}-rank{rank}.json").write_text(json.dumps(facts))
        is_last = groups.following is None
        if is_last and groups.tp.rank == groups.cp.rank == 0:
            torch.save(logits, folder / f"{name}-dp{groups.dp_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
