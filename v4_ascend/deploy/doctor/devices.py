"""Devices: as many as planned, of the right chip, healthy, free, and with their nodes in /dev."""

from __future__ import annotations

from collections.abc import Iterator

from v4_ascend.deploy.doctor import outputs
from v4_ascend.deploy.doctor.finding import Finding, Host, Level
from v4_ascend.deploy.doctor.gathering import GPU_QUERY

NODES = {
    "a2": ("davinci_manager", "devmm_svm", "hisi_hdc"),
    "a3": ("davinci_manager", "devmm_svm", "hisi_hdc"),
    "950": ("davinci_manager", "hisi_hdc", "ummu", "uburma"),
}
NODES_SOURCE = "vllm-ascend tutorials and MindCluster's docker runtime: devices to pass in"
UB_NODES = ("ummu", "uburma")  # UnifiedBus; a host with one 950 was seen working without


def npus_of(host: Host) -> list[outputs.Npu]:
    """Return the NPUs that npu-smi lists."""
    output = host.facts.commands.get("npu-smi info")
    return outputs.npus(output.text) if output is not None else []


def family_of(host: Host) -> str | None:
    """Return whose rules hold: what npu-smi lists, else what the topology says."""
    rows = npus_of(host)
    return rows[0].family if rows else host.expected.family


def present(host: Host) -> Iterator[Finding]:
    """The tool answers, and lists as many devices as the topology has."""
    if host.kind == "cpu":
        why = "emulated" if host.expected.emulated else "this host computes on its CPU"
        yield host.says("not-applicable", "devices.present", f"devices: {why}")
        return
    tool, command = ("npu-smi", "npu-smi info") if host.kind == "npu" else ("nvidia-smi", GPU_QUERY)
    output = host.facts.commands.get(command)
    if output is None:
        yield host.says(
            "blocker",
            "devices.present",
            f"{tool} is not installed",
            expected=f"{tool} on PATH: its driver, mounted into a container too",
            next_step=f"{tool}",
        )
        return
    n = len(npus_of(host)) if host.kind == "npu" else len(outputs.gpus(output.text))
    if output.code != 0 or n == 0:
        code = "did not end in time" if output.code is None else f"ended with {output.code}"
        last = (output.text.strip().splitlines() or ["it printed nothing"])[-1].strip()
        yield host.says(
            "blocker",
            "devices.present",
            f"{tool} {code}, lists {n} devices: {last}",
            value=n,
            expected="devices",
            next_step=tool + " info",
        )
        return
    wanted = host.expected.n_devices
    is_short = wanted is not None and n < wanted
    yield host.says(
        "blocker" if is_short else "ok",
        "devices.present",
        f"{tool} lists {n} devices" + (f", {wanted} are planned" if wanted else ""),
        value=n,
        expected=f"at least {wanted}",
        next_step=f"{tool} info; lower devices_per_host if that is all there are",
    )


def chip(host: Host) -> Iterator[Finding]:
    """The chips are the profile's."""
    rows, wanted = npus_of(host), host.expected.family
    if host.kind != "npu" or not rows or wanted is None:
        return
    wrong = [r for r in rows if r.family != wanted]
    yield host.says(
        "blocker" if wrong else "ok",
        "devices.chip",
        f"the chips are {(wrong or rows)[0].name}",
        value=rows[0].name,
        expected=f"a chip of family {wanted}, as cluster.device says",
        next_step="v4-ascend plan --topology F with the right cluster.device",
        source="hixl platform_detect.py",
    )


def healthy(host: Host) -> Iterator[Finding]:
    """Every device is well."""
    rows = npus_of(host) if host.kind == "npu" else []
    for r in rows:
        if r.health != "OK":
            level: Level = "warning" if r.health == "Warning" else "blocker"
            yield host.says(
                level,
                "devices.health",
                f"NPU {r.npu} chip {r.chip} has health {r.health}",
                value=r.health,
                expected="OK",
                next_step=f"npu-smi info -t health -i {r.npu}",
                source="npu-smi: OK, Warning, Alarm, Critical, UNKNOWN",
            )
    if rows and all(r.health == "OK" for r in rows):
        yield host.says("ok", "devices.health", f"{len(rows)} devices are OK")
    for g in _gpus(host):
        if g.ecc_errors:
            yield host.says(
                "warning",
                "devices.health",
                f"GPU {g.index} has {g.ecc_errors} uncorrected ECC errors",
                value=g.ecc_errors,
                expected="0",
                next_step=f"nvidia-smi -q -d ECC -i {g.index}",
            )


def free(host: Host) -> Iterator[Finding]:
    """The memory that the plan counts on is free."""
    part, used = host.expected.memory_utilisation, host.expected.n_devices
    rows = (
        [(f"NPU {r.npu} chip {r.chip}", r.used_mb, r.total_mb, r.processes) for r in npus_of(host)]
        if host.kind == "npu"
        else [(f"GPU {g.index}", g.used_mb, g.total_mb, ()) for g in _gpus(host)]
    )
    is_full = False
    for name, taken, total, processes in rows[:used]:
        if total - taken >= part * total and not processes:
            continue
        is_full = True
        by = f", taken by {', '.join(processes)}" if processes else ""
        level: Level = "blocker" if total - taken < part * total else "warning"
        if not host.expected.has_topology:
            level = "warning"
        yield host.says(
            level,
            "devices.memory",
            f"{name} has {total - taken:,} of {total:,} MB free{by}",
            value=total - taken,
            expected=f"{part * total:,.0f} MB",
            next_step="stop what runs there, or lower serve.memory_utilisation",
            source="serve.memory_utilisation, which the plan counts on",
        )
    if rows and not is_full:
        yield host.says("ok", "devices.memory", f"the memory of {len(rows[:used])} devices is free")


def nodes(host: Host) -> Iterator[Finding]:
    """What a process opens to reach the devices is in /dev: A2 and A3 differ from 950."""
    family = family_of(host)
    if host.kind != "npu" or family not in NODES:
        return
    n_devices = host.expected.n_devices or len(npus_of(host))
    has = set(host.facts.nodes)
    missing = [n for n in NODES[family] if n not in has]
    for name in missing:
        is_needed = name not in UB_NODES or n_devices > 1
        yield host.says(
            "blocker" if is_needed else "warning",
            "devices.nodes",
            f"/dev/{name} is not there, and {family.upper()} needs it",
            value=name,
            expected=", ".join(f"/dev/{n}" for n in NODES[family]),
            next_step=f"docker run ... --device /dev/{name}",
            source=NODES_SOURCE,
        )
    n_nodes = sum(n.removeprefix("davinci").isdigit() for n in has)
    if n_nodes < n_devices:
        yield host.says(
            "blocker",
            "devices.nodes",
            f"/dev has {n_nodes} davinci devices, {n_devices} are used",
            value=n_nodes,
            expected=f"/dev/davinci0 to davinci{n_devices - 1}",
            next_step="docker run ... --device /dev/davinciN for each",
            source=NODES_SOURCE,
        )
    elif not missing:
        yield host.says("ok", "devices.nodes", f"{n_nodes} davinci nodes and the others are there")


def _gpus(host: Host) -> list[outputs.Gpu]:
    output = host.facts.commands.get(GPU_QUERY) if host.kind == "cuda" else None
    return outputs.gpus(output.text) if output is not None else []


CHECKS = (present, chip, healthy, free, nodes)
