"""Who is to blame: for a step that does not end, and for values that are not numbers."""

import asyncio
import time

import pytest
from test_parallel import checkpoint as checkpoint
from test_parallel import make_plan

from v4_ascend.errors import ParityError
from v4_ascend.ops import use_policy
from v4_ascend.runtime.dispatcher import Dispatcher, RankState
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.messages import Beat, Sampling, SequenceStep, Step
from v4_ascend.runtime.scheduler import Scheduler

LAYOUT = {"pp_size": 2, "dp_size": 2, "ep_size": 2}
DRAW = Sampling(temperature=0.0, top_p=1.0, seed=0)


def blamed(checkpoint, folder, beats, seconds):
    async def look():
        scheduler = Scheduler(max_batch_size=4, max_chunk=8, max_waiting=9, eos_id=1)
        d = Dispatcher(scheduler, folder, make_plan(checkpoint, LAYOUT))
        now = time.monotonic()
        for rank, beat in enumerate(beats):
            d.ranks[rank] = RankState(pid=1, heard=now, moved=now - seconds, beat=beat)
        d._sent = {7: now - seconds}
        d._name_the_stuck(now)
        d.link.close()
        return d.health.reason

    return asyncio.run(look())


def test_the_rank_that_waits_for_nobody_keeps_the_others(checkpoint, tmp_path):
    in_dispatch = Beat(7, 40, "step 7: ep all_gather float32[2, 128]")
    before = Beat(7, 12, "step 7: pp receive from rank 0")
    beats = [in_dispatch, Beat(7, 40, None), before, before]
    reason = blamed(checkpoint, tmp_path, beats, seconds=9)
    assert reason.startswith(
        "rank 1 (stage 0, layers 0 to 2, experts 4 to 7, here device 0) has kept "
    )
    assert "step 7 for 9 s; others are in step 7: " in reason


def test_of_ranks_that_all_wait_the_one_behind_is_named(checkpoint, tmp_path):
    beats = [Beat(7, n, "step 7: ep all_gather") for n in (40, 40, 31, 40)]
    assert blamed(checkpoint, tmp_path, beats, seconds=20).startswith("rank 2 (stage 1, ")


def test_a_step_that_has_just_begun_blames_nobody(checkpoint, tmp_path):
    assert blamed(checkpoint, tmp_path, [Beat(7, 1, None)] * 4, seconds=1) is None


def test_values_that_are_not_finite_name_the_stage(checkpoint):
    plan = make_plan(checkpoint, {}, kernels="reference")
    with use_policy(kernels="reference"):
        engine = Engine.load(plan, lambda done, total: None)
        engine.model.layers[3].attn_norm.fill_(float("nan"))
        step = Step(5, [SequenceStep(0, 0, [3, 4], 0, DRAW)])
        with pytest.raises(ParityError, match="rank 0: step 5: layers 0 to 5 made values that"):
            engine.step(step)
