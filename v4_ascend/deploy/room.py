"""Whether a deployment finds room beside the one it replaces, and on which devices.

What it needs is what the memory plan says of each rank (modelled); what there is, is asked of the
hosts now, while the other one runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from v4_ascend.deploy.doctor import outputs
from v4_ascend.deploy.doctor.facts import Facts
from v4_ascend.deploy.doctor.gathering import CGROUP_LIMITS, GPU_QUERY
from v4_ascend.supernode.cache import BLOCK_TOKENS
from v4_ascend.supernode.plan import Plan
from v4_ascend.supernode.planning import PoolPlan

FRONT_BYTES = 300 << 20  # measured: the front of a soak of 2,000 requests had 268 MiB
MB = 1 << 20  # as npu-smi and nvidia-smi count


@dataclass(frozen=True)
class Room:
    """The plan, on the devices where it fits or else where it was; `why` has the figures."""

    plan: Plan
    is_enough: bool
    why: str
    shares_devices: bool


@dataclass(frozen=True)
class Lack:
    """Where there is too little, in bytes."""

    where: str
    needed: float
    free: float

    def __str__(self) -> str:
        return (
            f"{self.where} has {self.free / 1e9:.1f} GB free, "
            f"{self.needed / 1e9:.1f} GB are needed (modelled)"
        )


def needed(pool: PoolPlan, plan: Plan) -> list[int]:
    """Return the bytes of each rank: weights, states and caches, modelled.

    Raises:
        ValueError: the pool has no layout.
    """
    if pool.chosen is None:
        raise ValueError("no legal layout")
    p = plan.parallel
    tokens = plan.cache_tokens or plan.max_batch_size * plan.max_model_len
    blocks = -(-tokens // (p.dp_size * BLOCK_TOKENS))
    of_stage = [m.fixed + blocks * m.per_block for m in pool.chosen.memory]
    return [of_stage[r.rank // p.stage_size] for r in plan.ranks]


def find_room(pool: PoolPlan, plan: Plan, running: Plan, facts: Mapping[str, Facts | None]) -> Room:
    """Look for room on idle devices first, then beside the other one on its own.

    `facts` are those of the plan's hosts, None of one that could not be asked.
    """
    of_ranks = needed(pool, plan)
    if pool.system.profile.kind == "cpu" or plan.emulated:
        lacks = _of_hosts(plan, of_ranks, facts)
        total = (sum(of_ranks) + FRONT_BYTES) / 1e9
        return _room(plan, lacks, f"its {total:.1f} GB (modelled) fit beside", shares=True)
    beside = elsewhere(plan, running, pool.system.devices_per_host)
    if beside is not None and not _of_devices(beside, of_ranks, facts):
        return _room(beside, [], "devices are idle", shares=False)
    lacks = _of_devices(plan, of_ranks, facts)
    worst = f"{max(of_ranks) / 1e9:.1f} GB a device (modelled) fit beside"
    return _room(plan, lacks, worst, shares=True)


def _room(plan: Plan, lacks: Sequence[Lack], fits: str, *, shares: bool) -> Room:
    return Room(plan, not lacks, str(lacks[0]) if lacks else fits, shares)


def elsewhere(plan: Plan, running: Plan, n_devices: int) -> Plan | None:
    """Return the plan on devices of its hosts that the other has not; None if they are too few.

    Each host has `n_devices`.
    """
    idle: dict[str, list[int]] = {}
    for host in {r.host for r in plan.ranks}:
        taken = {r.device for r in running.ranks if r.host == host}
        idle[host] = [d for d in range(n_devices) if d not in taken]
    moved = []
    for rank in plan.ranks:
        if not idle[rank.host]:
            return None
        moved.append(rank.model_copy(update={"device": idle[rank.host].pop(0)}))
    return plan.model_copy(update={"ranks": tuple(moved)})


def _of_hosts(plan: Plan, of_ranks: Sequence[int], facts: Mapping[str, Facts | None]) -> list[Lack]:
    """Weigh the ranks of each host against the memory of the host."""
    lacks = []
    for host in dict.fromkeys(r.host for r in plan.ranks):
        want = sum(n for n, r in zip(of_ranks, plan.ranks, strict=True) if r.host == host)
        want += FRONT_BYTES if host == plan.ranks[0].host else 0
        free = _free_memory(facts.get(host))
        if free < want:
            lacks.append(Lack(host, want, free))
    return lacks


def _free_memory(facts: Facts | None) -> int:
    """Return what a host, and a container's limit, leave; 0 if it could not be asked."""
    if facts is None:
        return 0
    free = outputs.meminfo(facts.files.get("/proc/meminfo", "")).get("MemAvailable", 0)
    limits = [int(t) for p in CGROUP_LIMITS if (t := facts.files.get(p, "").strip()).isdigit()]
    return min([free, *limits])


def _of_devices(
    plan: Plan, of_ranks: Sequence[int], facts: Mapping[str, Facts | None]
) -> list[Lack]:
    """Weigh each rank against the memory of its device."""
    lacks = []
    for want, rank in zip(of_ranks, plan.ranks, strict=True):
        free = _free_devices(facts.get(rank.host))
        here = free[rank.device] if rank.device < len(free) else 0
        if here < want:
            lacks.append(Lack(f"device {rank.device} of {rank.host}", want, here))
    return lacks


def _free_devices(facts: Facts | None) -> list[int]:
    """Return the free bytes of a host's devices, as its tool lists them."""
    if facts is None:
        return []
    texts = [facts.commands[c].text for c in ("npu-smi info", GPU_QUERY) if c in facts.commands]
    rows = [r for t in texts for r in (outputs.npus(t) or outputs.gpus(t))]
    return [(r.total_mb - r.used_mb) * MB for r in rows]
