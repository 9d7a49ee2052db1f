"""What joins the devices: supernode ids, NVLink, and whether NPUs of two hosts reach each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from v4_ascend.deploy.doctor import outputs
from v4_ascend.deploy.doctor.finding import Finding, Host, Level, odd_ones
from v4_ascend.deploy.doctor.gathering import NVLINK, PING, SPOD

SPOD_SOURCE = (
    "Ascend SHMEM's notes for A3: Server Index must be that of the host's place, "
    "and is sometimes not set after a part was replaced"
)
NVLINK_SOURCE = "NVIDIA health validation, nvlink_active: no link of a GPU may be inactive"


def places_of(host: Host) -> dict[str, outputs.Place]:
    """Return each device's place in its supernode, by the command that said it."""
    found = {}
    for command, output in host.facts.commands.items():
        if command.startswith(SPOD) and (place := outputs.place(output.text)) is not None:
            found[command] = place
    return found


def _level(host: Host) -> Level:
    return "blocker" if host.expected.n_hosts > 1 else "warning"


def one_place(host: Host) -> Iterator[Finding]:
    """All devices of a host are in one supernode and at one place in it, each once."""
    places = places_of(host)
    if not places:
        return
    problems = []
    for label, values in (
        ("Super Pod ID", [p.pod for p in places.values()]),
        ("Server Index", [p.server for p in places.values()]),
    ):
        if len(set(values)) > 1:
            said = " and ".join(sorted(set(values)))
            problems.append((f"its devices have {label} {said}", "one for all devices of a host"))
    ids = [p.sdid for p in places.values() if p.sdid]
    if twice := next((i for i in ids if ids.count(i) > 1), None):
        problems.append((f"two of its devices have SDID {twice}", "an SDID for each device"))
    for what, expected in problems:
        yield host.says(
            _level(host),
            "network.supernode",
            what,
            expected=expected,
            next_step=f"{next(iter(places))}; correct it in the server's iBMC",
            source=SPOD_SOURCE,
        )
    if not problems:
        place = next(iter(places.values()))
        where = f"supernode {place.pod}, server {place.server}"
        yield host.says("ok", "network.supernode", f"{len(places)} devices are in {where}")


def planned_places(hosts: Sequence[Host]) -> Iterator[Finding]:
    """Hosts of one planned supernode are in one, and no two of them at one place."""
    first = {h.name: next(iter(places_of(h).values()), None) for h in hosts}
    by_plan: dict[str, list[Host]] = {}
    for h in hosts:
        if first[h.name] is not None:
            by_plan.setdefault(h.expected.supernode, []).append(h)
    for name, members in by_plan.items():
        if odd := odd_ones(members, lambda h: _pod(first[h.name])):
            yield Finding(
                "blocker",
                "all hosts",
                "network.supernode",
                f"the hosts of {name} have different Super Pod IDs: {odd}",
                expected="one: the plan counts on their fast fabric",
                next_step="cluster.supernodes by what the hosts are: an entry for each Super Pod",
                source="CANN, rank tables: super_pod_list",
            )
    at: dict[tuple[str, str], Host] = {}
    for h in hosts:
        place = first[h.name]
        if place is None:
            continue
        other = at.setdefault((place.pod, place.server), h)
        if other is not h:
            # Servers that are in none may all say the same; who plans one says that they are.
            is_one = other.expected.supernode == h.expected.supernode
            yield h.says(
                "blocker" if is_one else "warning",
                "network.supernode",
                f"{other.name} too is server {place.server} of supernode {place.pod}",
                expected="a Server Index for each host",
                next_step=f"{SPOD} -i 0 -c 0  # on both; correct it in the server's iBMC",
                source=SPOD_SOURCE,
            )


def _pod(place: outputs.Place | None) -> str:
    return place.pod if place is not None else ""


def nvlink(host: Host) -> Iterator[Finding]:
    """GPUs that a plan joins have all their links up."""
    output = host.facts.commands.get(NVLINK)
    links = outputs.nvlinks(output.text) if output is not None and output.code == 0 else {}
    n_devices = host.expected.n_devices or len(links)
    if host.kind != "cuda" or n_devices < 2 or not links:
        return
    most = max(up for up, _ in links.values())
    if most == 0:
        yield host.says(
            "hint",
            "network.nvlink",
            "no NVLink is up: GPUs talk over PCIe",
            expected="NVLink, where the server has it",
            next_step="nvidia-smi topo -m",
            source=NVLINK_SOURCE,
        )
        return
    is_well = True
    for gpu, (up, total) in links.items():
        if up == most:
            continue
        is_well = False
        yield host.says(
            "blocker" if up == 0 else "warning",
            "network.nvlink",
            f"GPU {gpu} has {up} of {total} NVLinks up, others {most}",
            value=up,
            expected=str(most),
            next_step=f"{NVLINK} -i {gpu}; drain the host and reset the GPU",
            source=NVLINK_SOURCE,
        )
    if is_well:
        yield host.says("ok", "network.nvlink", f"{len(links)} GPUs have {most} NVLinks up")


def pings(hosts: Sequence[Host]) -> Iterator[Finding]:
    """An NPU's port reaches that of another host: RDMA between hosts goes that way."""
    pods = {h.name: {p.pod for p in places_of(h).values()} for h in hosts}
    # Within one supernode of A3, HCCL goes over HCCS, and RoCE may not even be wired.
    is_one = len(hosts) > 1 and all(pods.values()) and len(set.union(*pods.values())) == 1
    n_well = 0
    for h in hosts:
        for command, output in h.facts.commands.items():
            if not PING.fullmatch(command):
                continue
            sent, received = outputs.pinged(output.text)
            if sent and sent == received:
                n_well += 1
                continue
            device, address = command.split()[2], command.split()[-1]
            said = (output.text.strip().splitlines() or ["nothing"])[-1].strip()
            level: Level = "warning" if received or is_one else "blocker"
            yield h.says(
                level,
                "network.ping",
                f"NPU port {device} does not reach {address} of another host: {said}"
                if not received
                else f"NPU port {device} loses packets to {address}: {said}",
                value=received,
                expected="every packet back",
                next_step=f"{command}; look at VLAN, gateway and -link of both ports",
                source="hccn_tool; HCCL guide: RoCE between hosts",
            )
    if n_well:
        yield Finding("ok", "all hosts", "network.ping", f"{n_well} NPU ports reach another host's")


CHECKS = (one_place, nvlink)
ACROSS = (planned_places, pings)
