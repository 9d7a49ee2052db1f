"""What the keys of a 1.x table must be to each other. A value already refused is passed over."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from typing import NamedTuple

from v4_ascend.supernode.ranktable.findings import Entry, Findings, show

Pods = Sequence[tuple[Entry, Sequence[Entry]]]


class Server(NamedTuple):
    """An entry of server_list and its devices."""

    entry: Entry
    devices: tuple[Entry, ...]


def check_relations(
    found: Findings, top: Entry, servers: Sequence[Server], pods: Pods
) -> dict[str, str]:
    """Note each broken relation; return the supernode of each server."""
    if servers and top["server_count"] not in (None, len(servers)):
        found.add(
            "server_count",
            f"must be {show(str(len(servers)))}, the servers in server_list, "
            f"got {show(str(top['server_count']))}",
        )
    supernode_of = _members(found, servers, pods)
    for server in servers:
        _check_server(found, server, supernode_of.get(server.entry["server_id"]))
    _check_ranks(found, servers)
    _check_backups(found, servers)
    _check_modes(found, servers, has_pods=not top.lacks("super_pod_list"))
    _check_device_ips(found, top, servers, pods)
    if pods:
        _check_together(found, servers, supernode_of)
    return supernode_of


def _members(found: Findings, servers: Sequence[Server], pods: Pods) -> dict[str, str]:
    known = [s.entry["server_id"] for s in servers]
    supernode_of: dict[str, str] = {}
    for pod, members in pods:
        if pod["super_pod_id"] is not None:
            found.once("super_pod_id", pod["super_pod_id"], pod.at("super_pod_id"))
        for member in members:
            name, where = member["server_id"], member.at("server_id")
            if name is None:
                continue
            found.once("server_id", name, where, scope="super_pod_list")
            if name not in known:
                found.add(where, f"{show(name)} is not in server_list; list it there")
            supernode_of.setdefault(name, pod["super_pod_id"])
    if pods:
        for server in servers:
            name = server.entry["server_id"]
            if name is not None and name not in supernode_of:
                where = server.entry.at("server_id")
                found.add(where, f"{show(name)} is in no supernode; add it to super_pod_list")
    return supernode_of


def _check_server(found: Findings, server: Server, supernode: str | None) -> None:
    where = server.entry.where
    if server.entry["server_id"] is not None:
        found.once("server_id", server.entry["server_id"], server.entry.at("server_id"))
    for device in server.devices:
        for key, scope in (
            ("rank_id", None),
            ("device_id", where),
            ("host_port", where),
            ("super_device_id", supernode),
        ):
            if device[key] is not None:
                found.once(key, device[key], device.at(key), scope=scope)
        if device["device_ip"] is not None:
            found.once("device_ip", _same(device["device_ip"]), device.at("device_ip"))


def _check_ranks(found: Findings, servers: Sequence[Server]) -> None:
    n_devices = sum(len(s.devices) for s in servers)
    for server in servers:
        given = [d for d in server.devices if d["rank_id"] is not None]
        for device in given:
            if device["rank_id"] >= n_devices:
                found.add(
                    device.at("rank_id"),
                    f"must be below {n_devices}, the number of devices, "
                    f"got {show(str(device['rank_id']))}",
                )
        ranks = sorted({d["rank_id"] for d in given})
        if ranks and ranks[-1] - ranks[0] >= len(server.devices):
            found.add(
                server.entry.at("device"),
                f"ranks {', '.join(map(str, ranks))} are not contiguous; "
                f"a server holds a range of ranks, such as {ranks[0]} to "
                f"{ranks[0] + len(server.devices) - 1}",
            )


def _check_backups(found: Findings, servers: Sequence[Server]) -> None:
    by_ip = {
        _same(d["device_ip"]): (s.entry.where, d)
        for s in servers
        for d in s.devices
        if d["device_ip"] is not None
    }
    for server in servers:
        for device in server.devices:
            if device["backup_device_ip"] is None:
                if device["backup_device_port"] is not None:
                    found.add(device.at("backup_device_port"), "needs a backup_device_ip")
                continue
            owner_where, owner = by_ip.get(_same(device["backup_device_ip"]), ("", None))
            if owner is None or None in (owner["device_id"], device["device_id"]):
                continue
            # The two dies of one NPU are devices 2n and 2n+1; only they back each other up.
            if owner_where != server.entry.where or owner["device_id"] != device["device_id"] ^ 1:
                found.add(
                    device.at("backup_device_ip"),
                    f"{show(device['backup_device_ip'])} is of {owner.where}; it must be of the "
                    f"other die of the same NPU, device {device['device_id'] ^ 1}",
                )
            elif owner["device_port"] == device["backup_device_port"] is not None:
                found.add(
                    device.at("backup_device_port"),
                    f"{device['backup_device_port']} is the device_port of {owner.where}, "
                    "which has that address; the two must differ",
                )


def _check_modes(found: Findings, servers: Sequence[Server], *, has_pods: bool) -> None:
    for device in (d for s in servers for d in s.devices):
        if has_pods and device.lacks("super_device_id"):
            found.add(
                device.where,
                '"super_device_id" is missing; super_pod_list needs it: '
                "the SDID of `npu-smi info -t spod-info`",
            )
        elif device["super_device_id"] is not None and not has_pods:
            found.add(
                device.at("super_device_id"),
                "needs a super_pod_list; without one HCCL treats servers as separate",
            )


def _check_device_ips(found: Findings, top: Entry, servers: Sequence[Server], pods: Pods) -> None:
    is_server_mode = top.lacks("super_pod_list")
    units, n = ("server", len(servers)) if is_server_mode else ("supernode", len(pods))
    if n <= 1:
        return
    for device in (d for s in servers for d in s.devices):
        if device.lacks("device_ip"):
            found.add(
                device.at("device_ip"), f"is missing; required with more than one {units} ({n})"
            )


def _check_together(
    found: Findings, servers: Sequence[Server], supernode_of: dict[str, str]
) -> None:
    last: dict[str, int] = {}
    for i, server in enumerate(servers):
        supernode = supernode_of.get(server.entry["server_id"])
        if supernode is None:
            continue
        if last.get(supernode, i - 1) != i - 1:
            found.add(
                server.entry.at("server_id"),
                f"{show(server.entry['server_id'])} is of supernode {show(supernode)}, whose other "
                f"servers end at server_list[{last[supernode]}]; list them together",
            )
        last[supernode] = i


def _same(address: str) -> str:
    """Return the one spelling of an address: IPv6 has several."""
    return str(ip_address(address))
