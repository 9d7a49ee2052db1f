"""Version 2.0 as JSON, where every number is one and a rank has addresses per network layer.

The table names no hosts. A layer-0 instance is a host or, on pods whose layer 0 is a cabinet,
several: there the physical `device_id` starts again on each host while `local_id` goes on.
Layer 1 is the fabric of a supernode.

Source: CANN HCCL user guide, cluster_info_config/rank_table_config_a5.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from v4_ascend.supernode.ranktable.findings import (
    Entry,
    Findings,
    Key,
    integer,
    non_empty_list,
    one_of,
    text_of,
)
from v4_ascend.supernode.ranktable.model import (
    HOST_PORT,
    Address,
    Device,
    Host,
    Level,
    RankTable,
    Status,
)
from v4_ascend.supernode.ranktable.v2_rules import Layer, Rank, check_relations

MAX_RANKS, MAX_LOCAL_ID = 65536, 64
MAX_NET_LAYER, MAX_PORTS = 7, 16
MAX_PORTS_TEXT = 32  # characters of all ports of an address, joined by commas
MAX_INSTANCE_ID, MAX_ADDR = 1024, 256  # characters
_PORT = integer(1024, 65535)


def _any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def _ports(value: Any) -> tuple[str, ...]:
    is_list = isinstance(value, list) and 1 <= len(value) <= MAX_PORTS
    pattern = rf"{HOST_PORT}|[0-9]+/[0-9]+"
    if not is_list or not all(isinstance(p, str) and re.fullmatch(pattern, p) for p in value):
        raise ValueError(f'1 to {MAX_PORTS} ports, each "die/port" or "{HOST_PORT}"')
    if len(",".join(value)) > MAX_PORTS_TEXT:
        raise ValueError(f"at most {MAX_PORTS_TEXT} characters of ports")
    return tuple(value)


_RANK = {
    "rank_id": Key(integer(0, MAX_RANKS - 1)),
    "local_id": Key(integer(0, MAX_LOCAL_ID)),
    "device_id": Key(integer(0, MAX_LOCAL_ID)),
    "device_port": Key(_PORT, False),
    "host_port": Key(_PORT, False),
    "level_list": Key(non_empty_list),
}
_LEVEL = {
    "net_layer": Key(integer(0, MAX_NET_LAYER)),
    "net_instance_id": Key(text_of(MAX_INSTANCE_ID)),
    "net_type": Key(one_of("TOPO_FILE_DESC", "CLOS")),
    "net_attr": Key(_any_text, False),
    "rank_addr_list": Key(non_empty_list),
}
_ADDRESS = {
    "addr_type": Key(one_of("EID", "IPV4", "IPV6")),
    "addr": Key(text_of(MAX_ADDR)),
    "ports": Key(_ports),
    "plane_id": Key(_any_text, False),
}


def read_v2(found: Findings, data: dict[str, Any], file: str, header: dict[str, Key]) -> RankTable:
    """Read a table of version 2.0; `header` has the keys every version has.

    Raises:
        RankTableError: with each rule it breaks.
    """
    keys = header | {
        "rank_count": Key(integer(1, MAX_RANKS)),
        "rank_list": Key(non_empty_list),
    }
    top = found.entry(data, "", keys)
    ranks = [_rank(found, r) for r in found.entries(top, "rank_list", _RANK)]
    check_relations(found, top, ranks)
    found.require_none(file)
    status: Status = top["status"] or "completed"
    return RankTable(version="2.0", status=status, hosts=_hosts(ranks))


def _rank(found: Findings, entry: Entry) -> Rank:
    levels = found.entries(entry, "level_list", _LEVEL)
    return Rank(entry, [Layer(e, found.entries(e, "rank_addr_list", _ADDRESS)) for e in levels])


def _hosts(ranks: Sequence[Rank]) -> tuple[Host, ...]:
    seen: Counter[tuple[str | None, int]] = Counter()
    groups: dict[tuple[str, int], list[Rank]] = {}
    for rank in sorted(ranks, key=lambda r: r.entry["rank_id"]):
        key = (rank.instance, rank.entry["device_id"])
        groups.setdefault((str(rank.instance), seen[key]), []).append(rank)
        seen[key] += 1
    shared = {instance for instance, n in groups if n > 0}
    return tuple(
        Host(
            name=f"{instance}/{n}" if instance in shared else instance,
            supernode=_supernode(members[0]),
            devices=tuple(map(_device, members)),
        )
        for (instance, n), members in groups.items()
    )


def _supernode(rank: Rank) -> str | None:
    on_layer_1 = (x.entry["net_instance_id"] for x in rank.layers if x.entry["net_layer"] == 1)
    return next(on_layer_1, None)


def _device(rank: Rank) -> Device:
    levels = tuple(
        Level(
            **{k: v for k, v in layer.entry.values.items() if k != "rank_addr_list"},
            addresses=tuple(Address(**a.values) for a in layer.addresses),
        )
        for layer in rank.layers
    )
    values = {k: v for k, v in rank.entry.values.items() if k != "level_list"}
    return Device(**values, levels=levels)


def write_v2(status: Status, hosts: tuple[Host, ...]) -> dict[str, Any]:
    """Return the document of a table; facts its version has no key for are left out."""
    devices = sorted((d for h in hosts for d in h.devices), key=lambda d: d.rank_id)
    return {
        "status": status,
        "version": "2.0",
        "rank_count": len(devices),
        "rank_list": [
            _given(d, _RANK) | {"level_list": [_level(x) for x in d.levels]} for d in devices
        ],
    }


def _level(level: Level) -> dict[str, Any]:
    return _given(level, _LEVEL) | {
        "rank_addr_list": [_given(a, _ADDRESS) for a in level.addresses]
    }


def _given(of: Device | Level | Address, keys: dict[str, Key]) -> dict[str, Any]:
    return {k: v for k in keys if (v := getattr(of, k, None)) is not None}
