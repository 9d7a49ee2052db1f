"""One rank: loads its part of the model, proves itself, runs steps. A torchrun child."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import torch

from v4_ascend import emulation
from v4_ascend.backends import find_backend
from v4_ascend.errors import V4AscendError
from v4_ascend.model.resident import resident_bytes
from v4_ascend.ops import use_policy
from v4_ascend.runtime.canary import canary
from v4_ascend.runtime.comm import joined
from v4_ascend.runtime.compilations import Compilations
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.flight import FRONT, Flight
from v4_ascend.runtime.link import Address, RankLink, is_alive
from v4_ascend.runtime.messages import (
    Beat,
    End,
    ExpertCounts,
    Failed,
    Loading,
    Ready,
    Start,
    Step,
    ToRank,
)
from v4_ascend.runtime.operator_times import is_timed, timed
from v4_ascend.supernode.plan import Plan

log = logging.getLogger(__name__)
BEAT_SECONDS = 1.0
COUNT_SECONDS = 5.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve the front until it is gone; exit 1 if that is not possible."""
    _die_with_parent()
    state = Path(sys.argv[1])
    plan, address = Plan.read(state / "plan.json"), Address.read(state)
    rank = rank_of(plan, os.environ["V4_ASCEND_HOST"], int(os.environ["LOCAL_RANK"]))
    link = RankLink(address, rank)
    try:
        if plan.emulated:
            emulation.install(plan.chip or "950dt", _n_devices(plan, rank))
        with use_policy(backend=plan.backend, kernels=plan.kernels, fallback=plan.fallback):
            _serve(link, plan, rank, address)
    except (V4AscendError, RuntimeError, ValueError, OSError) as e:
        link.send(Failed(f"{type(e).__name__}: {e}"))
        raise


def rank_of(plan: Plan, host: str, local_rank: int) -> int:
    """Return the plan's number of a host's process: torchrun numbers hosts as they come."""
    return [r.rank for r in plan.ranks if r.host == host][local_rank]


def _n_devices(plan: Plan, rank: int) -> int:
    """Return how many devices a rank's host has, as far as the plan uses them."""
    return 1 + max(r.device for r in plan.ranks if r.host == plan.ranks[rank].host)


def _die_with_parent() -> None:
    """Ask the kernel to end us when torchrun ends, however it does, even while we load."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _serve(link: RankLink, plan: Plan, rank: int, address: Address) -> None:
    torch.set_grad_enabled(False)
    reported = -1

    def progress(done: int, total: int) -> None:
        nonlocal reported
        tenth = done * 10 // total
        if tenth > reported:
            reported = tenth
            link.send(Loading(done, total))

    device = _device(plan, rank)
    flight, compilations = Flight(), Compilations(rank)
    beating = Thread(target=_beat, args=(address, rank, flight, compilations), daemon=True)
    beating.start()
    match link.receive():
        case Start(attempt):
            pass
        case _:
            return  # the front is gone
    met = joined(plan, rank, device, flight, attempt)
    with met as groups, use_policy(around=flight.called):
        engine = Engine.load(plan, progress, groups)
        report = canary(engine, plan)
        if plan.capture_sizes is not None:
            engine.capture(plan.capture_sizes)
        elif why := engine.capture_few():
            log.warning("decode steps are not replayed: %s", why)
        resident = resident_bytes(engine.model)
        graphs = len(engine.graphs or ())
        link.send(Ready(report.kind, report.median_relative_error, resident, graphs))
        find_backend(plan.backend, "plan.backend").watch_compilations(compilations.add)
        counted = time.monotonic()
        while isinstance(step := _next(link, flight), Step):
            if groups.is_first_of_stage and is_timed(step):
                with timed(step, device, flight) as times:
                    result = engine.step(step, may_replay=False)
            else:
                result, times = engine.step(step), []
            if engine.answers:
                link.send(result)
            for measured in times:
                link.send(measured)
            if time.monotonic() - counted > COUNT_SECONDS:  # it waits for the device
                link.send(ExpertCounts(engine.expert_counts()))
                counted = time.monotonic()


def _next(link: RankLink, flight: Flight) -> ToRank | None:
    with flight.clock(FRONT):
        return link.receive()


def _device(plan: Plan, rank: int) -> torch.device:
    """Return the device that the plan gives a rank, and make it this process's own."""
    device = torch.device(find_backend(plan.backend, "plan.backend").device())
    index = plan.ranks[rank].device
    if device.type == "cpu" or not index:
        return device
    torch.get_device_module(device).set_device(index)
    return torch.device(device.type, index)


def _beat(address: Address, rank: int, flight: Flight, compilations: Compilations) -> None:
    link = RankLink(address, rank, is_heartbeat=True)
    while is_alive(address.followed_pid):
        beat = Beat(
            flight.step,
            flight.n_exchanges,
            flight.waiting,
            dict(flight.bytes_sent),
            dict(flight.waited_s),
            flight.operator,
            flight.dispatch,
            compilations.n,
        )
        link.send(beat)
        match link.poll(BEAT_SECONDS):
            case End(reason):
                sys.stderr.write(f"rank {rank}: told to end: {reason}\n")
                os._exit(1)  # the main thread may wait for a rank that never answers
    os._exit(0)  # the front is gone, and who loads or computes does not see it


if __name__ == "__main__":
    main()
