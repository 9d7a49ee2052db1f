"""What ranks cost and what overlapping micro-batches gain, on processes of this machine.

``python -m v4_ascend.runtime.bench_ranks FOLDER RANK`` runs one rank of the plans in
FOLDER/cases.json; `bench_ranks` starts them. Every process has one thread, so that the ratios say
what splitting costs and not how many cores there are.

Beside the speed stands what the plan says of it: the bytes that leave the ranks, and how long
stages are idle if each computes for as long as it did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from v4_ascend.backends.exchange import FEW_RANKS
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import (
    Cluster,
    Model,
    ParallelConfig,
    Runtime,
    Serve,
    Supernode,
    Topology,
)
from v4_ascend.errors import DeployError
from v4_ascend.ops import use_policy
from v4_ascend.runtime.comm import Groups, joined
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.flight import Flight
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.runtime.link import STORE
from v4_ascend.supernode.plan import Plan
from v4_ascend.supernode.planning import deploy_plan
from v4_ascend.supernode.simulation import Pipeline, simulate
from v4_ascend.supernode.timing import LayerWork
from v4_ascend.supernode.traffic import Traffic

N_SEQUENCES = 16
PROMPT = 32
# The first is what the others are compared with. PP with one step at a time shows what overlap
# gains: it is the same work, each step waiting for the one before to leave the last stage.
LAYOUTS = {
    "1 process": ParallelConfig(),
    "2 ranks, ep 2": ParallelConfig(dp_size=2, ep_size=2),
    "4 ranks, ep 4": ParallelConfig(dp_size=4, ep_size=4),
    "8 ranks, ep 8": ParallelConfig(dp_size=8, ep_size=8),
    "2 ranks, tp 2": ParallelConfig(tp_size=2, ep_size=2),
    "2 stages, one step at a time": ParallelConfig(pp_size=2),
    "2 stages, two steps on their way": ParallelConfig(pp_size=2),
}


class Case(msgspec.Struct, frozen=True):
    """One line of the table: how a plan is driven."""

    plan: str
    store: str
    n_batches: int
    waits: bool
    n_steps: int


class Seen(msgspec.Struct, frozen=True):
    """What a rank saw of its decoding: seconds, of them waited for other stages, and bytes."""

    seconds: float
    waited_s: float
    sent: float
    planned: float


@dataclass(frozen=True, slots=True)
class RankSpeed:
    """Decoded tokens per second of all sequences together, and the ranks that did it.

    `sent` are the bytes that left ranks for a token, `planned` those the plan expects; `idle` is
    the part of its time that each stage waited in, `simulated` what the plan's simulation says.
    """

    what: str
    n_ranks: int
    tokens_per_s: float
    sent: float
    planned: float
    idle: tuple[float, ...]
    simulated: tuple[float, ...]


def bench_ranks(
    checkpoint: Path, n_steps: int, progress: Callable[[int, int], None]
) -> list[RankSpeed]:
    """Time every layout in turn.

    Raises:
        DeployError: a rank failed; the message has the end of what it wrote.
        ConfigError: the checkpoint's experts or heads cannot be split so.
    """
    config = ModelConfig.read(checkpoint)
    speeds = []
    with tempfile.TemporaryDirectory() as name:
        for number, (what, layout) in enumerate(LAYOUTS.items()):
            plan = plan_here(
                checkpoint,
                config,
                layout,
                length=PROMPT + n_steps,
                n_sequences=N_SEQUENCES,
                max_chunk=PROMPT * N_SEQUENCES,
            )
            n_batches = 2 if layout.pp_size > 1 else 1
            waits = what.endswith("one step at a time")
            case = Case(
                plan.model_dump_json(),
                str(Path(name) / f"store-{number}"),
                n_batches,
                waits,
                n_steps,
            )
            seen = _time(Path(name), case, layout.world_size)
            speeds.append(_speed(what, case, seen))
            progress(number + 1, len(LAYOUTS))
    return speeds


def _speed(what: str, case: Case, seen: list[Seen]) -> RankSpeed:
    n_tokens = N_SEQUENCES * case.n_steps
    sent, planned = (sum(getattr(s, k) for s in seen) / n_tokens for k in ("sent", "planned"))
    of_stages = seen if case.n_batches > 1 else []  # which have one rank each
    idle = tuple(s.waited_s / s.seconds for s in of_stages)
    simulated = _simulated(case, of_stages) if of_stages else ()
    rate = n_tokens / seen[0].seconds
    return RankSpeed(what, len(seen), rate, sent, planned, idle, simulated)


def _simulated(case: Case, seen: list[Seen]) -> tuple[float, ...]:
    """Let the plan's simulation say how long stages are idle that compute for as long as these."""
    n = case.n_steps * case.n_batches
    stages = tuple((LayerWork((s.seconds - s.waited_s) / n),) for s in seen)
    pipeline = Pipeline(stages, 1, 1, 1 if case.waits else n, is_decode=False)
    return tuple(1 - busy for busy in simulate(pipeline).busy)


def plan_here(
    checkpoint: Path,
    config: ModelConfig,
    layout: ParallelConfig,
    *,
    length: int,
    n_sequences: int,
    max_chunk: int,
) -> Plan:
    """Plan so many sequences of a length for processes of this machine."""
    here = Supernode(name="here", hosts=("localhost",), devices_per_host=layout.world_size)
    topology = Topology(
        name="bench",
        cluster=Cluster(device="cpu", supernodes=(here,)),
        model=Model(checkpoint=str(checkpoint.absolute()), name="bench"),
        serve=Serve(max_model_len=max(length, 128), concurrency=n_sequences),
        layout=layout,
        runtime=Runtime(max_chunk=max_chunk),
    )
    return deploy_plan(topology, config)


def _time(folder: Path, case: Case, n_ranks: int) -> list[Seen]:
    (folder / "case.json").write_bytes(msgspec.json.encode(case))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, str(folder)]
    ranks = [
        subprocess.Popen([*command, str(r)], stderr=subprocess.PIPE, env=env)
        for r in range(n_ranks)
    ]
    try:
        errors = [r.communicate()[1] for r in ranks]
    finally:
        for r in ranks:
            r.kill()
            r.wait()
    for number, (rank, error) in enumerate(zip(ranks, errors, strict=True)):
        if rank.returncode:
            raise DeployError(f"rank {number}: {error.decode()[-500:]}")
    files = (folder / f"rank{r}.json" for r in range(n_ranks))
    return [msgspec.json.decode(f.read_bytes(), type=Seen) for f in files]


def main() -> None:
    """Run one rank."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    case = msgspec.json.decode((folder / "case.json").read_bytes(), type=Case)
    plan = Plan.model_validate_json(case.plan)
    os.environ[STORE] = f"file://{case.store}"
    torch.set_num_threads(1)
    with joined(plan, rank, torch.device("cpu"), Flight()) as groups, use_policy(backend="cpu"):
        engine = Engine.load(
            plan, lambda done, total: None, groups if plan.parallel.world_size > 1 else None
        )
        seen = _decode(engine, groups, case, plan)
    (folder / f"rank{rank}.json").write_bytes(msgspec.json.encode(seen))


def _decode(engine: Engine, groups: Groups, case: Case, plan: Plan) -> Seen:
    """Fill the caches, then time decoding, micro-batch after micro-batch."""
    slots = list(range(engine.n_slots))
    size = len(slots) // case.n_batches
    batches = [slots[i * size : (i + 1) * size] for i in range(case.n_batches)]
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, engine.config.vocab_size, (PROMPT + case.n_steps,), generator=g).tolist()

    def run(start: int, tokens: Sequence[int]) -> None:
        for batch in batches:
            engine.logits([Chunk(slot, list(tokens), start) for slot in batch])
            if case.waits:
                wait()

    def wait() -> None:
        with flight.clock("pp"):
            groups.barrier()

    flight = groups.flight
    run(0, ids[:PROMPT])
    groups.barrier()
    before, waited, began = flight.bytes_sent.copy(), flight.waited_s["pp"], time.perf_counter()
    for step in range(case.n_steps):
        run(PROMPT + step, ids[PROMPT + step : PROMPT + step + 1])
    wait()
    seconds, waited = time.perf_counter() - began, flight.waited_s["pp"] - waited
    sent = (flight.bytes_sent - before).total()
    return Seen(seconds, waited, sent, case.n_steps * _planned(engine, plan, batches, groups.rank))


def _planned(engine: Engine, plan: Plan, batches: list[list[int]], rank: int) -> float:
    """Return the bytes that the plan expects to leave a rank in one step of all batches."""
    p, model = plan.parallel, engine.model
    traffic = Traffic(
        config=model.config,
        parallel=p,
        layers=[plan.ranks[s * p.stage_size].layers for s in range(p.pp_size)],
        value_bytes=model.numerics.dtype.itemsize,
        gathers=p.ep_size <= FEW_RANKS,
        fp8=model.layers[0].ffn.experts.w13.rounds_input,
    )
    return sum(sum(traffic.decode(rank, [len(b)] * p.dp_size).values()) for b in batches)


if __name__ == "__main__":
    main()
