"""Stages are idle for as long as the plan's simulation says, measured inside the ranks."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from layouts import make_plan, write_tiny
from parallel_plans import ENVIRONMENT

from v4_ascend.config.model import ModelConfig
from v4_ascend.runtime.dispatcher import Dispatcher
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.link import STORE
from v4_ascend.runtime.messages import Sampling
from v4_ascend.runtime.scheduler import Scheduler
from v4_ascend.supernode.simulation import Pipeline, simulate
from v4_ascend.supernode.timing import LayerWork

RANK = Path(__file__).with_name("paced_rank.py")
STAGES = ((0, 4), (4, 6))
LAYER_S, TAIL_S = 0.06, 0.03
N_TOKENS = 12
GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0)


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """By number of running requests: the part of its time that each stage waited in."""
    folder = tmp_path_factory.mktemp("paced")
    checkpoint = write_tiny(folder / "checkpoint")
    plan = make_plan(checkpoint, {"pp_size": 2}, max_batch_size=2, kernels="fast")
    ranks = [r.model_copy(update={"layers": s}) for r, s in zip(plan.ranks, STAGES, strict=True)]
    plan = plan.model_copy(update={"ranks": tuple(ranks)})
    plan.write(folder / "plan.json")
    return asyncio.run(served(folder, plan, (1, 2)))


async def served(folder, plan, batches):
    limits = limits_of(plan, ModelConfig.read(Path(plan.checkpoint)))
    scheduler = Scheduler(limits, eos_id=-1, n_in_flight=plan.parallel.pp_size)
    dispatcher = Dispatcher(scheduler, folder, plan)
    env = os.environ | ENVIRONMENT | {STORE: f"file://{folder / 'store'}"}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, (RANK, folder, r.rank, LAYER_S, TAIL_S))], env=env
        )
        for r in plan.ranks
    ]
    running = asyncio.create_task(dispatcher.run())
    try:
        deadline = time.monotonic() + 120
        while not dispatcher.health.is_ready:
            assert time.monotonic() < deadline, dispatcher.health
            assert not running.done()
            await asyncio.sleep(0.05)
        found, seen = {}, 0
        for n in batches:
            await asyncio.gather(*(drawn(dispatcher, i) for i in range(n)))
            steps = [notes(folder, r.rank) for r in plan.ranks]
            found[n] = [of_rank[seen:] for of_rank in steps]
            seen = len(steps[-1])
        return {n: waited(of_ranks, n) for n, of_ranks in found.items()}
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        dispatcher.link.close()
        for p in processes:
            p.kill()
            p.wait()


async def drawn(dispatcher, i):
    tokens = [t async for t in dispatcher.generate([5 + i, 7], N_TOKENS, GREEDY)]
    assert len(tokens) == N_TOKENS


def notes(folder, rank):
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


def waited(of_ranks, n_running):
    """Leave out the rounds in which requests begin or end."""
    parts = []
    for steps in of_ranks:
        (began, before), (ended, after) = steps[2 * n_running], steps[-1 - 2 * n_running]
        assert len(steps) >= n_running * (N_TOKENS - 1)
        total = sum(after.get(k, 0) - before.get(k, 0) for k in ("pp", "front"))
        parts.append(total / (ended - began))
    return parts


@pytest.mark.parametrize("n_running", [1, 2])
def test_stages_wait_as_the_simulation_says(idle, n_running):
    """A request is a micro-batch; stages are uneven, so that not even two fill both."""
    stages = tuple((LayerWork(LAYER_S),) * (end - first) for first, end in STAGES)
    seen = simulate(Pipeline(stages, 1, 1, n_running, tail_s=TAIL_S), n_steps=6)
    assert idle[n_running] == pytest.approx([1 - busy for busy in seen.busy], abs=0.02)
