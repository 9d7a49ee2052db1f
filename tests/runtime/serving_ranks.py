"""One rank of several plans in turn, serving requests: ``python serving_ranks.py FOLDER RANK``.

FOLDER has cases.json: for each case a plan, the file where ranks meet, what `requests_of` makes
requests of, and the right answers, which some guesses are. Every rank has a scheduler of its own:
all are told the same, and say the same. Each writes FOLDER/CASE-rankN.json.
"""

import json
import os
import sys
from dataclasses import replace as changed
from pathlib import Path

import torch
import torch.distributed as dist

from v4_ascend.ops import use_policy
from v4_ascend.runtime.comm import joined
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.flight import Flight
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.link import STORE
from v4_ascend.runtime.messages import StepResult
from v4_ascend.supernode.plan import Plan

sys.path.append(str(Path(__file__).parents[1]))
from served import Noting, drive, lucky, requests_of  # noqa: E402


def whole(result):
    """Join what the ranks that answer have drawn, as the front does."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, result.sampled)
    return StepResult(result.number, [s for sampled in parts for s in sampled])


def answered(engine, step):
    """Run a step; what a rank returns that does not answer is dropped, as `worker` does."""
    result = engine.step(step)
    return result if engine.answers else StepResult(step.number, [])


def run(plan, rank, case):
    with joined(plan, rank, torch.device("cpu"), Flight()) as groups:
        with use_policy(kernels=plan.kernels):
            engine = Engine.load(plan, lambda done, total: None, groups)
            requests = requests_of(case["shapes"], engine.config.vocab_size, case["grammar"])
            truth = {int(n): tokens for n, tokens in case["truth"].items()}
            limits = changed(limits_of(plan, engine.config), min_acceptance=0.0)
            noting = Noting(lucky(truth, plan.n_draft_tokens))
            tokens, scheduler = drive(
                [engine],
                limits,
                requests,
                noting,
                n_in_flight=plan.parallel.pp_size,
                n_groups=plan.parallel.dp_size,
                whole=whole,
            )
        return {
            "tokens": tokens,
            "guesses": [(*at, drafts) for at, drafts in noting.seen.items()],
            "counters": vars(scheduler.counters),
            "kept": len(engine._sends),  # streams that are held until they have arrived
        }


def main(folder, rank):
    torch.set_num_threads(1)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        plan = Plan.model_validate(case["plan"])
        if rank < plan.parallel.world_size:
            os.environ[STORE] = f"file://{case['store']}"
            found = run(plan, rank, case)
            (folder / f"{name}-rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
