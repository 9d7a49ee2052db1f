"""Three questions before anything is loaded: does it fit, how long a context, how many requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from v4_ascend.config.devices import DeviceProfile
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import Workload
from v4_ascend.supernode.memory import MemoryModel, Serving
from v4_ascend.supernode.search import Choice, Demand, Found, Search
from v4_ascend.supernode.system import System


@dataclass(frozen=True, slots=True)
class Fit:
    """Answers for one model on some devices. Contexts in tokens, requests over all devices.

    `longest` is for the asked concurrency with one request of that length among them;
    `longest_all` if every one of them is so long. `most_full` requests of the asked context
    fit at full length, `most_running` may run if one of them is.
    """

    choice: Choice | None
    found: Found
    longest: int
    longest_all: int
    most_full: int
    most_running: int
    binding_term: str


def whole_system(profile: DeviceProfile, n_devices: int) -> System:
    """Return `n_devices` of a profile in whole hosts of one supernode."""
    per_host = min(profile.devices_per_host, n_devices)
    n_hosts = -(-n_devices // per_host)
    return System(
        profile=profile,
        role="both",
        hosts=tuple(f"host{i}" for i in range(n_hosts)),
        devices_per_host=per_host,
        supernode_sizes=(n_devices,),
        supernode_names=("sp0",),
        levels=tuple(profile.fabric.items()),
        inter=profile.inter,
    )


def fit(config: ModelConfig, system: System, serving: Serving, concurrency: int) -> Fit:
    """Answer the three questions over all legal layouts."""
    n = serving.max_model_len
    out = max(1, n // 9)
    work = Workload(input_tokens=min(8192, max(1, n - out)), output_tokens=min(1024, out))
    search = Search(config, system, serving, Demand(concurrency, "context", work))
    found = search.run()
    if not found.choices:
        return Fit(None, found, 0, 0, 0, 0, "")
    choice = found.choices[0]
    worst = min(choice.memory, key=lambda m: m.n_blocks)
    return Fit(
        choice=choice,
        found=found,
        longest=min(choice.max_context, config.max_seq_len),
        longest_all=min(
            max(_longest_all(c, concurrency) for c in found.choices), config.max_seq_len
        ),
        most_full=max(c.n_full(n) for c in found.choices),
        most_running=max(_most_running(search.memory, c, n) for c in found.choices[:8]),
        binding_term=worst.binding_term,
    )


def _longest_all(choice: Choice, concurrency: int) -> int:
    per_group = -(-concurrency // choice.parallel.dp_size)
    return min(m.n_blocks // per_group for m in choice.memory) * 128


def _most_running(memory: MemoryModel, choice: Choice, n_tokens: int) -> int:
    """Find the most running requests of each group by doubling, then halving."""
    p = choice.parallel

    def fits(batch: int) -> bool:
        return all(memory.stage(p, r, batch).fits(n_tokens) for r in choice.layers)

    most = 1
    while fits(2 * most):
        most *= 2
    step = most
    while step := step // 2:
        if fits(most + step):
            most += step
    return most * p.dp_size


def smallest_fit(
    config: ModelConfig, profile: DeviceProfile, serving: Serving, sizes: Sequence[int]
) -> int | None:
    """Return the first of `sizes` devices on which one request of full length fits."""
    for n in sizes:
        system = whole_system(profile, n)
        demand = Demand(1, "devices", Workload(input_tokens=1, output_tokens=1))
        if Search(config, system, serving, demand).run().choices:
            return n
    return None
