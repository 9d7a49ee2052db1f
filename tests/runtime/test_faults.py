"""Who is to blame: for a step that does not end, and for values that are not numbers."""

import json
import os
import subprocess
import sys

import pytest
from layouts import make_plan
from parallel_plans import SCRIPT, steps_of
from test_parallel import checkpoint as checkpoint

from v4_ascend.errors import ParityError
from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.messages import Beat, Sampling, SequenceStep, Step
from v4_ascend.runtime.watch import RankState, Watch

LAYOUT = {"pp_size": 2, "dp_size": 2, "ep_size": 2}
DRAW = Sampling(temperature=0.0, top_p=1.0, seed=0)


def judged(checkpoint, beats, seconds, layout=LAYOUT, hosts=("here",) * 4, failed=()):
    """The verdict after `seconds` in which nothing has moved."""
    plan = make_plan(checkpoint, layout)
    ranks = [r.model_copy(update={"host": h}) for r, h in zip(plan.ranks, hosts, strict=True)]
    watch = Watch(plan.model_copy(update={"ranks": tuple(ranks)}))
    now = 1000.0
    for rank, beat in enumerate(beats):
        watch.ranks[rank] = RankState(os.getpid(), heard=now, moved=now - seconds, beat=beat)
    for rank, reason, age in failed:
        watch.failed(rank, reason, now - age)
    return watch, lambda later=0.0: watch.look(now + later, 7, now - seconds)


def test_the_rank_that_waits_for_nobody_keeps_the_others(checkpoint):
    in_dispatch = Beat(7, 40, "step 7: ep all_gather float32[2, 128]")
    before = Beat(7, 12, "step 7: pp receive from rank 0")
    beats = [in_dispatch, Beat(7, 40, None), before, before]
    watch, look = judged(checkpoint, beats, seconds=9)
    verdict = look()
    assert (verdict.rank, verdict.action) == (1, "name")
    assert verdict.reason.startswith("has kept step 7 for 9 s; others are in step 7: ")
    assert watch.name(1) == "rank 1 (stage 0, layers 0 to 2, experts 4 to 7, here device 0)"


def test_a_rank_that_keeps_the_others_for_long_is_ended(checkpoint, monkeypatch):
    monkeypatch.setenv("V4_ASCEND_COMM_TIMEOUT", "20")
    _, look = judged(checkpoint, [Beat(7, n, "x") for n in (9, 9, 9, 8)], seconds=11)
    assert (look().rank, look().action) == (3, "end")


def test_of_ranks_that_all_wait_the_one_behind_is_named(checkpoint):
    beats = [Beat(7, n, "step 7: ep all_gather") for n in (40, 40, 31, 40)]
    assert judged(checkpoint, beats, seconds=20)[1]().rank == 2


def test_a_step_that_has_just_begun_blames_nobody(checkpoint):
    assert judged(checkpoint, [Beat(7, 1, None)] * 4, seconds=1)[1]() is None


def test_a_silent_rank_is_named_and_then_ended(checkpoint, monkeypatch):
    monkeypatch.setenv("V4_ASCEND_COMM_TIMEOUT", "40")
    watch, look = judged(checkpoint, [Beat(7, 1, None)] * 4, seconds=1)
    for rank in (0, 1, 3):
        watch.ranks[rank].heard += 11
    assert look(5.5).reason.startswith("has not answered for 6 s (pid ")
    assert (look(5.5).rank, look(5.5).action, look(10.5).action) == (2, "name", "end")


def test_of_another_host_the_rank_that_fell_silent_is_blamed_for_failures_of_others(checkpoint):
    hosts, closed = ("a", "a", "b", "b"), [(1, "RuntimeError: connection closed", 0.0)]
    watch, look = judged(checkpoint, [Beat(7, 1, None)] * 4, 1, hosts=hosts, failed=closed)
    for rank in (0, 1, 2):
        watch.ranks[rank].heard += 2.5  # rank 3 has not been heard since
    assert look(2.0) is None  # not yet: rank 3 may be heard
    assert look(3.1).rank == 3
    assert look(3.1).reason == "no word for 3 s; rank 1 failed: RuntimeError: connection closed"


def test_a_rank_that_says_why_it_failed_is_believed(checkpoint):
    failed = [(2, "ParityError: not finite", 1.0), (0, "RuntimeError: closed", 0.9)]
    verdict = judged(checkpoint, [Beat(7, 1, None)] * 4, 1, failed=failed)[1]()
    assert (verdict.rank, verdict.reason) == (2, "failed: ParityError: not finite")


@pytest.mark.parametrize("has_pidfd", [True, False])
@pytest.mark.parametrize("first", range(4))
def test_of_ranks_that_all_ended_the_first_is_blamed(checkpoint, first, has_pidfd, monkeypatch):
    """Torchrun ends the others before anyone has looked."""
    if not has_pidfd:
        monkeypatch.setattr(os, "pidfd_open", lambda pid: os.open("/nothing", 0))  # an old kernel
    plan = make_plan(checkpoint, LAYOUT)
    watch = Watch(plan)
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in plan.ranks]
    for rank, sleeper in enumerate(sleepers):
        watch.met(rank, sleeper.pid)
        watch.ranks[rank].heard = 999.0 - (rank == first)
    assert watch.look(1000.0, None, 0) is None
    for rank in sorted(range(4), key=lambda r: (r != first, -r)):
        sleepers[rank].kill()
        sleepers[rank].wait()
    verdict = watch.look(1000.0, None, 0)
    assert (verdict.rank, verdict.reason) == (first, f"ended (pid {sleepers[first].pid})")
    assert watch.look(1000.0, None, 0).rank == first
    watch.forget()
    assert watch.look(1000.0, None, 0) is None


def test_values_that_are_not_finite_name_the_stage(checkpoint):
    plan = make_plan(checkpoint, {}, kernels="reference")
    with use_policy(kernels="reference"):
        engine = Engine.load(plan, lambda done, total: None)
        engine.model.layers[3].attn_norm.fill_(float("nan"))
        step = Step(5, [SequenceStep(0, 0, [3, 4], 0, DRAW)])
        with pytest.raises(ParityError, match="rank 0: step 5: layers 0 to 5 made values that"):
            engine.step(step)


def test_ranks_of_two_plans_name_both_and_end(checkpoint, tmp_path):
    plans = [make_plan(checkpoint, {"dp_size": 2}, max_chunk=n) for n in (64, 96)]
    case = {"store": str(tmp_path / "store"), "steps": steps_of(2)}
    processes = []
    for rank, plan in enumerate(plans):
        folder = tmp_path / str(rank)
        folder.mkdir()
        cases = {"mixed": case | {"plan": json.loads(plan.model_dump_json())}}
        (folder / "cases.json").write_text(json.dumps(cases))
        command = [sys.executable, str(SCRIPT), str(folder), str(rank)]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    errors = [p.communicate(timeout=60)[1] for p in processes]
    a, b = (p.digest[:16] for p in plans)
    for rank, (process, error) in enumerate(zip(processes, errors, strict=True)):
        assert process.returncode == 1
        assert f"DeployError: rank {rank}: rank 0 has plan {a}, rank 1 has {b}" in error
