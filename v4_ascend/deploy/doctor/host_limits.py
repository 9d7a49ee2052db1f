"""The host itself: memory, limits of processes, and settings of the kernel."""

from __future__ import annotations

from collections.abc import Iterator

from v4_ascend.deploy.doctor import outputs
from v4_ascend.deploy.doctor.finding import Finding, Host, Level
from v4_ascend.deploy.doctor.gathering import CGROUP_LIMITS

GIB = 2**30
RANK_BYTES = 4 * GIB  # ours: torch with a vendor library takes 1 to 3 GiB before any weight
MIN_FILES = 1024  # ours: the usual default; a rank opens each weight file and a socket per peer
FILES = PROCESSES = 65535
NPROC_SOURCE = "cann-recipes-infer docker run: --ulimit nproc=65535"
MIN_PROCESSES = 4096  # ours: 16 ranks with 100 threads each, and room
SHM_BYTES = GIB  # ours: docker's default is 64 MiB, tutorials give 512 GiB
TUNING = "vllm-ascend tutorials, host tuning"


def memory(host: Host) -> Iterator[Finding]:
    """Processes start, and on a CPU the weights fit, within what the container may use."""
    free = outputs.meminfo(host.facts.files.get("/proc/meminfo", "")).get("MemAvailable")
    if free is None:
        return
    limits = [int(t) for p in CGROUP_LIMITS if (t := host.facts.files.get(p, "").strip()).isdigit()]
    usable = min([free, *limits])
    n = host.expected.n_devices or 1
    weights = host.facts.checkpoint.n_bytes if host.facts.checkpoint is not None else 0
    if host.kind == "cpu":
        needed, why = weights // host.expected.n_hosts, "the weights, which a CPU keeps there"
    else:
        needed, why = n * RANK_BYTES, f"{n} ranks with 4 GiB each"
    if not host.expected.has_topology:
        needed = 0
    by = "a cgroup allows" if usable < free else "there are"
    yield host.says(
        "blocker" if usable < needed else "ok",
        "host.memory",
        f"{by} {usable / GIB:,.1f} GiB of host memory",
        value=usable,
        expected=f"{needed / GIB:,.1f} GiB for {why}",
        next_step="free",
        source="ours, see RANK_BYTES in host_limits.py",
    )


def ulimits(host: Host) -> Iterator[Finding]:
    """A process may have enough files and threads, and pin memory for RDMA."""
    limits = host.facts.limits
    for name, flag, least, good, source in (
        ("nofile", "n", MIN_FILES, FILES, "ours: files and sockets of a rank"),
        ("nproc", "u", MIN_PROCESSES, PROCESSES, NPROC_SOURCE),
    ):
        value = limits.get(name, -1)
        if value == -1 or value >= good:
            continue
        level: Level = "blocker" if value < least else "hint"
        yield host.says(
            level,
            "host.ulimit",
            f"ulimit -{flag} ({name}) is {value:,}",
            value=value,
            expected=f"{good:,}",
            next_step=f"ulimit -{flag} {good}",
            source=source,
        )
    memlock = limits.get("memlock", -1)
    if host.kind != "cpu" and host.expected.n_hosts > 1 and memlock != -1:
        yield host.says(
            "warning",
            "host.ulimit",
            f"ulimit -l (memlock) is {memlock:,} bytes",
            value=memlock,
            expected="unlimited: RDMA pins its buffers",
            next_step="ulimit -l unlimited",
            source="rdma-core documentation",
        )


def shared_memory(host: Host) -> Iterator[Finding]:
    """/dev/shm holds what processes of one host share."""
    shm = host.facts.spaces.get("shm")
    if shm is not None and shm.total < SHM_BYTES:
        yield host.says(
            "warning",
            "host.shm",
            f"/dev/shm has {shm.total / 2**20:,.0f} MiB",
            value=shm.total,
            expected="1 GiB at least",
            next_step="docker run ... --shm-size=512g",
            source="vllm-ascend tutorials; the least is ours",
        )


def tuning(host: Host) -> Iterator[Finding]:
    """Settings of the kernel that the vendor advises; slower without, never wrong."""
    if host.kind != "npu":
        return
    for path, wanted, command in (
        ("/proc/sys/kernel/numa_balancing", "0", "sysctl -w kernel.numa_balancing=0"),
        ("/proc/sys/vm/swappiness", "0", "sysctl -w vm.swappiness=0"),
        (
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
            "performance",
            "cpupower frequency-set -g performance",
        ),
    ):
        value = host.facts.files.get(path, wanted).strip()
        if value != wanted:
            yield host.says(
                "hint",
                "host.tuning",
                f"{path} is {value}",
                value=value,
                expected=wanted,
                next_step=command,
                source=TUNING,
            )
    huge = outputs.meminfo(host.facts.files.get("/proc/meminfo", "")).get("HugePages_Total")
    if huge == 0:
        yield host.says(
            "hint",
            "host.hugepages",
            "no huge pages are reserved",
            value=0,
            expected="some, if the engine is told to use them",
            next_step="sysctl -w vm.nr_hugepages=N",
            source="ours: no published V4 set-up needs them",
        )


CHECKS = (memory, ulimits, shared_memory, tuning)
