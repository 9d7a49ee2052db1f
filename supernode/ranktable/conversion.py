"""From one version to another: what a version needs, and what it has no key for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from v4_ascend.errors import RankTableError
from v4_ascend.supernode.ranktable.file import parse_table, table_json
from v4_ascend.supernode.ranktable.model import Device, Host, RankTable, Status, Version


class _Fact(NamedTuple):
    has: Callable[[Device], bool]
    source: str


_DEVICE_IP = _Fact(lambda d: d.device_ip is not None, "`hccn_tool -i N -ip -g` says it")
_SDID = _Fact(
    lambda d: d.super_device_id is not None, "the SDID of `npu-smi info -t spod-info` is it"
)
_LOCAL_ID = _Fact(lambda d: d.local_id is not None, "the factory's topology file numbers devices")
_LEVELS = _Fact(lambda d: bool(d.levels), "a 2.0 table of the host has it; no dump says EIDs")


def table_of(
    hosts: Sequence[Host], version: Version, status: Status, name: str = "rank table"
) -> RankTable:
    """Return the table of ranks as they are numbered; nothing it needs is made up.

    Raises:
        RankTableError: what `version` needs and `hosts` lack, or each rule it would break.
    """
    if problems := missing(hosts, version):
        raise RankTableError(name, problems)
    draft = RankTable(version=version, status=status, hosts=tuple(hosts))
    return parse_table(table_json(draft), name, allow_planned=True)


def missing(hosts: Sequence[Host], version: Version) -> list[str]:
    """Return what a version needs and hosts do not have."""
    needed: dict[str, _Fact] = {}
    if version == "2.0":
        needed = {"local_id": _LOCAL_ID, "level_list": _LEVELS}
    elif version == "1.2":
        needed = {"super_device_id": _SDID}
        if len({h.supernode for h in hosts}) > 1:
            needed["device_ip"] = _DEVICE_IP
    elif len(hosts) > 1:
        needed = {"device_ip": _DEVICE_IP}
    problems = []
    for key, fact in needed.items():
        without = [(h.name, d.device_id) for h in hosts for d in h.devices if not fact.has(d)]
        if without:
            host, device = without[0]
            problems.append(
                f"{key}: version {version} needs it, {len(without)} devices lack it, the first "
                f"is device {device} of {host!r}; {fact.source}"
            )
    if version == "1.2" and (alone := [h.name for h in hosts if h.supernode is None]):
        problems.append(
            f"super_pod_list: version 1.2 needs it, {len(alone)} hosts are in no supernode, "
            f"the first is {alone[0]!r}; the Super Pod ID of `npu-smi info -t spod-info` is it"
        )
    return problems


def convert(
    table: RankTable, version: Version, name: str = "rank table"
) -> tuple[RankTable, list[str]]:
    """Return the table in another version, and the facts that has no key for.

    Raises:
        RankTableError: what `version` needs and the table lacks.
    """
    converted = table_of(table.hosts, version, table.status, name)
    return converted, lost(table, converted)


def lost(before: RankTable, after: RankTable) -> list[str]:
    """Return the facts of one table that the other does not hold."""
    facts = []
    for things, key in (
        *(("devices", key) for key in Device.model_fields),
        *(("hosts", key) for key in ("host_ip", "supernode")),
    ):
        n = _count(before, things, key) - _count(after, things, key)
        if n > 0:
            name = "level_list" if key == "levels" else key
            facts.append(f"{name} of {n} {things if n > 1 else things[:-1]}")
    return facts


def _count(table: RankTable, things: str, key: str) -> int:
    return sum(getattr(x, key) not in (None, ()) for x in getattr(table, things))
