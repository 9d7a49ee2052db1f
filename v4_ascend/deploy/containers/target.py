"""What is to run where: the same for compose files and for pods."""

from __future__ import annotations

from dataclasses import dataclass, field

from v4_ascend.config.topology import Topology
from v4_ascend.deploy.containers.platforms import Platform, platform_of, platforms
from v4_ascend.deploy.torchrun import hosts_of
from v4_ascend.deploy.vllm.launches import PROXY, Launch, reached
from v4_ascend.deploy.vllm.show import ASKED
from v4_ascend.errors import NotYetError
from v4_ascend.supernode.environment import environment
from v4_ascend.supernode.plan import Plan
from v4_ascend.supernode.planning import PoolPlan

# Where a container finds what it needs. A folder each: Kubernetes mounts no single files.
PLAN, SECRET, STATE = (f"/run/v4-ascend/{name}" for name in ("plan", "secret", "state"))
READY_SECONDS, DRAIN_SECONDS = 600, 30
STOP_SECONDS = DRAIN_SECONDS + 30


@dataclass(frozen=True)
class Health:
    """Where a process answers HTTP on its own host, and which path says that it is ready."""

    url: str
    path: str

    @property
    def port(self) -> int:
        """The port of it."""
        return int(self.url.rpartition(":")[2])


@dataclass(frozen=True)
class Process:
    """What one container runs. A variable that is None is taken from whoever starts it."""

    name: str
    host: str
    argv: tuple[str, ...]
    env: dict[str, str | None] = field(hash=False)
    devices: tuple[int, ...]
    health: Health | None
    after: tuple[str, ...] = ()  # names of those on its host that must be ready before


@dataclass(frozen=True)
class Target:
    """A deployment of containers."""

    topology: Topology
    platform: Platform
    image: str
    processes: tuple[Process, ...]
    plan: Plan | None  # None with engine vllm, whose commands say all
    timeout_s: int

    @property
    def hosts(self) -> tuple[str, ...]:
        """Return the hosts, the first one first."""
        return tuple(dict.fromkeys(p.host for p in self.processes))

    @property
    def plan_text(self) -> str:
        """Return the plan as `deploy --dry-run` prints it."""
        return self.plan.model_dump_json(indent=2) + "\n" if self.plan is not None else ""

    def mounted_paths(self) -> tuple[str, ...]:
        """Return the folders and files of the model, the same inside as outside."""
        model = self.topology.model
        return (model.checkpoint, *([model.reference] if model.reference else []))


def native(topology: Topology, plan: Plan, pool: PoolPlan) -> Target:
    """Return one container for each host of a plan, that runs ``v4-ascend host``."""
    platform = platform_of(pool.system.profile)
    hosts = hosts_of(plan)
    known = {v.name: v.value for v in environment(pool)}
    timeout_s = max(READY_SECONDS, int(known.pop("V4_ASCEND_READY_TIMEOUT", 0)))
    # What asks a shell is left to the host: it finds the interface by its address.
    env: dict[str, str | None] = {k: v for k, v in known.items() if "$" not in v}
    env |= _places(platform)
    processes = [
        Process(
            "v4-ascend",
            host,
            host_command(topology, ("--index", str(i)), hosts[0], timeout_s),
            env,
            tuple(r.device for r in plan.ranks if r.host == host),
            Health(f"http://{reached(plan.host)}:{plan.port}", "/ready") if i == 0 else None,
        )
        for i, host in enumerate(hosts)
    ]
    image = topology.container.image or platform.own_image()
    return Target(topology, platform, image, tuple(processes), plan, timeout_s)


def _places(platform: Platform) -> dict[str, str | None]:
    """Say where a process may write: state, and as another user than root its caches too."""
    is_root = platform.user.value == "root"
    return {"XDG_STATE_HOME": STATE} if is_root else {"XDG_STATE_HOME": STATE, "HOME": STATE}


def host_command(
    topology: Topology, which: tuple[str, str], first: str, timeout_s: int
) -> tuple[str, ...]:
    """Return the command of a host; which one and the first may be variables of the cluster."""
    return (
        *("v4-ascend", "host", "--plan", f"{PLAN}/plan.json", *which),
        *("--first", first, "--port", str(topology.container.port)),
        *("--secret", f"{SECRET}/secret", "--timeout", str(timeout_s)),
        *("--drain-timeout", str(DRAIN_SECONDS)),
    )


def vllm(topology: Topology, launches: tuple[Launch, ...], pools: tuple[PoolPlan, ...]) -> Target:
    """Return one container for each process of vLLM.

    Raises:
        NotYetError: pools on several kinds of devices.
    """
    pool, families = pools[0], dict.fromkeys(p.system.profile.family for p in pools)
    if len(families) > 1:
        raise NotYetError(
            topology.where("cluster.pools"),
            f"cluster.pools: {' and '.join(families)} together: not yet in containers",
        )
    platform = platform_of(pool.system.profile)
    image = topology.container.image or platform.base_image() or platform.own_image()
    per_host = tuple(range(pool.system.devices_per_host))
    processes = []
    for x in launches:
        argv, is_proxy = list(x.argv), x.role == "proxy"
        if is_proxy:
            argv[:2] = ["python3", f"{platforms().proxy_folder.value}/{PROXY}"]
        env = {k: ASKED.get(v, v) for k, v in x.env.items()} | _places(platform)
        health = Health(x.url, "/health") if x.url else None
        before = tuple(y.name for y in launches if y.host == x.host and y.order < x.order)
        devices = () if is_proxy else per_host
        processes.append(Process(x.name, x.host, tuple(argv), env, devices, health, before))
    return Target(topology, platform, image, tuple(processes), None, READY_SECONDS)
