"""Versions 1.0 and 1.2 as JSON, where every number is a string.

Source: CANN HCCL user guide, cluster_info_config/rank_table_config_a2.md and _a3.md.
"""

from __future__ import annotations

from typing import Any

from v4_ascend.supernode.ranktable.findings import (
    Entry,
    Findings,
    Key,
    digits,
    ip,
    non_empty_list,
    text_of,
)
from v4_ascend.supernode.ranktable.model import Device, Host, RankTable, Status, Version
from v4_ascend.supernode.ranktable.v1_rules import Server, check_relations

MAX_SERVER_ID = 64  # characters
MAX_NUMBER = 2**32 - 1  # an SDID is 32 bits; ranks and devices are fewer
_NUMBER, _PORT, _IP = digits(0, MAX_NUMBER), digits(1024, 65535), ip(4, 6)

_DEVICE_1_0 = {
    "device_id": Key(_NUMBER),
    "device_ip": Key(_IP, False),
    "device_port": Key(_PORT, False),
    "host_port": Key(_PORT, False),
    "rank_id": Key(_NUMBER),
}
_DEVICE_1_2 = _DEVICE_1_0 | {
    "super_device_id": Key(_NUMBER, False),
    "backup_device_ip": Key(_IP, False),
    "backup_device_port": Key(_PORT, False),
}
_SERVER = {
    "server_id": Key(text_of(MAX_SERVER_ID)),
    "host_ip": Key(ip(4), False),
    "device": Key(non_empty_list),
}
_POD = {"super_pod_id": Key(text_of(MAX_SERVER_ID)), "server_list": Key(non_empty_list)}
_MEMBER = {"server_id": Key(text_of(MAX_SERVER_ID))}


def read_v1(
    found: Findings, data: dict[str, Any], file: str, version: Version, header: dict[str, Key]
) -> RankTable:
    """Read a table of version 1.0 or 1.2; `header` has the keys every version has.

    Raises:
        RankTableError: with each rule it breaks.
    """
    is_1_2 = version == "1.2"
    keys = header | {
        "server_count": Key(_NUMBER, not is_1_2),
        "server_list": Key(non_empty_list),
    }
    if is_1_2:
        keys["super_pod_list"] = Key(non_empty_list, False)
    top = found.entry(data, "", keys)
    servers = [
        Server(s, tuple(found.entries(s, "device", _DEVICE_1_2 if is_1_2 else _DEVICE_1_0)))
        for s in found.entries(top, "server_list", _SERVER)
    ]
    pods = [(p, found.entries(p, "server_list", _MEMBER)) for p in _pods(found, top)]
    supernode_of = check_relations(found, top, servers, pods)
    found.require_none(file)
    hosts = tuple(_host(s, supernode_of.get(s.entry["server_id"])) for s in servers)
    return RankTable(version=version, status=top["status"], hosts=hosts)


def _pods(found: Findings, top: Entry) -> list[Entry]:
    return found.entries(top, "super_pod_list", _POD)


def _host(server: Server, supernode: str | None) -> Host:
    return Host(
        name=server.entry["server_id"],
        host_ip=server.entry["host_ip"],
        supernode=supernode,
        devices=tuple(Device(**d.values) for d in server.devices),
    )


def write_v1(version: Version, status: Status, hosts: tuple[Host, ...]) -> dict[str, Any]:
    """Return the document of a table; facts its version has no key for are left out."""
    keys = _DEVICE_1_2 if version == "1.2" else _DEVICE_1_0
    table: dict[str, Any] = {
        "status": status,
        "version": version,
        "server_count": str(len(hosts)),
        "server_list": [_server(h, keys) for h in hosts],
    }
    if version == "1.2" and hosts[0].supernode is not None:
        table["super_pod_list"] = [
            {
                "super_pod_id": name,
                "server_list": [{"server_id": h.name} for h in hosts if h.supernode == name],
            }
            for name in dict.fromkeys(h.supernode for h in hosts)
        ]
    return table


def _server(host: Host, keys: dict[str, Key]) -> dict[str, Any]:
    server: dict[str, Any] = {"server_id": host.name}
    if host.host_ip is not None:
        server["host_ip"] = host.host_ip
    server["device"] = [
        {k: str(v) for k in keys if (v := getattr(device, k)) is not None}
        for device in host.devices
    ]
    return server
