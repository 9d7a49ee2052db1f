"""A rank table from the hosts of a topology: from dumps and tables, or with placeholders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network
from itertools import chain
from pathlib import Path

from v4_ascend.config.devices import DeviceProfile
from v4_ascend.config.topology import Supernode
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.ranktable.conversion import table_of
from v4_ascend.supernode.ranktable.dumps import Dump, read_dump
from v4_ascend.supernode.ranktable.file import read_table
from v4_ascend.supernode.ranktable.model import (
    HOST_PORT,
    Address,
    Device,
    Host,
    Level,
    RankTable,
    Status,
    Version,
)
from v4_ascend.supernode.system import host_names

# Addresses set aside for documentation, which no network routes: RFC 5737, then RFC 3849.
PLACEHOLDERS = (
    IPv4Network("192.0.2.0/24"),
    IPv4Network("198.51.100.0/24"),
    IPv4Network("203.0.113.0/24"),
    IPv6Network("2001:db8::/32"),
)
PLACEHOLDER_PORTS = (("1/0",), ("0/4", "0/5", "0/6", "0/7"))  # layers 0 and 1 in HCCL's example
_VERSION_OF_SOC: dict[str, Version] = {
    "Ascend910B": "1.0",
    "Ascend910_93": "1.2",
    "Ascend950": "2.0",
}


def version_for(device: DeviceProfile) -> Version:
    """Return the version that a device's SoC reads.

    Raises:
        ConfigError: the profile has no SoC of Ascend.
    """
    for soc, version in _VERSION_OF_SOC.items():
        if device.soc is not None and device.soc.startswith(soc):
            return version
    raise ConfigError(
        "--version",
        f"device {device.name!r} has soc {device.soc!r}, which has no rank table of its own; "
        f"give 1.0, 1.2 or 2.0",
    )


def generate(hosts: Sequence[Host], version: Version, status: Status = "completed") -> RankTable:
    """Number the ranks over `hosts`, in their order, and return the checked table.

    Raises:
        RankTableError: what `version` needs and `hosts` lack, or each rule it would break.
    """
    numbered, n = [], 0
    for host in hosts:
        devices = [d.model_copy(update={"rank_id": n + i}) for i, d in enumerate(host.devices)]
        numbered.append(host.model_copy(update={"devices": tuple(devices)}))
        n += len(devices)
    return table_of(numbered, version, status, "generated table")


def hosts_from_folder(
    supernodes: Sequence[Supernode], folder: Path, where: str
) -> tuple[Host, ...]:
    """Read each host a topology names from ``HOST.txt``, a dump, or ``HOST.json``, its own table.

    With both, the table is taken and the dump must agree with it.

    Raises:
        ConfigError: a host is unnamed, has no file, or its files do not fit the topology.
    """
    if not folder.is_dir():
        raise ConfigError("--dumps", f"no folder {folder}")
    hosts: list[Host] = []
    for supernode in supernodes:
        if supernode.hosts is None:
            raise ConfigError(
                where,
                f"supernode {supernode.name!r} has host_count; a rank table needs the hosts' names",
            )
        found = [_host(name, folder) for name in supernode.hosts]
        _check_supernode(supernode, found, folder)
        hosts += [h.model_copy(update={"supernode": supernode.name}) for h in found]
    return tuple(hosts)


def _host(name: str, folder: Path) -> Host:
    dump_file, table_file = folder / f"{name}.txt", folder / f"{name}.json"
    dump = read_dump(dump_file) if dump_file.is_file() else None
    if not table_file.is_file():
        if dump is None:
            raise ConfigError("--dumps", f"{folder} has no {dump_file.name} or {table_file.name}")
        return dump.host
    table = read_table(table_file)
    if len(table.hosts) != 1:
        names = ", ".join(h.name for h in table.hosts)
        raise ConfigError(str(table_file), f"must be a table of one host, has {names}")
    host = table.hosts[0].model_copy(update={"name": name})
    if dump is not None:
        _check_agreement(host, dump, str(table_file))
    return host


def _check_agreement(host: Host, dump: Dump, file: str) -> None:
    dumped = {d.device_id: d for d in dump.host.devices}
    if sorted(dumped) != sorted(d.device_id for d in host.devices):
        raise ConfigError(file, f"has not the devices of {dump.file}: {sorted(dumped)}")
    for device in host.devices:
        for key in ("device_ip", "super_device_id"):
            ours, theirs = getattr(device, key), getattr(dumped[device.device_id], key)
            if None not in (ours, theirs) and ours != theirs:
                raise ConfigError(
                    file, f"device {device.device_id}: {key} is {ours}, in {dump.file} {theirs}"
                )
        if device.device_id not in dump.ports:
            continue
        ports = dump.ports[device.device_id]
        used = [p for x in device.levels for a in x.addresses for p in a.ports if p != HOST_PORT]
        for port in used:
            if not ports.get(port):
                state = "down" if port in ports else "absent"
                raise ConfigError(
                    file, f"device {device.device_id}: port {port} is {state} in {dump.file}"
                )


def _check_supernode(supernode: Supernode, hosts: Sequence[Host], folder: Path) -> None:
    for host in hosts:
        if len(host.devices) != supernode.devices_per_host:
            raise ConfigError(
                "--dumps",
                f"{folder}: {host.name!r} has {len(host.devices)} devices, the topology says "
                f"devices_per_host {supernode.devices_per_host}",
            )
        # A topology may split a physical supernode; it cannot join two.
        if host.supernode != hosts[0].supernode:
            raise ConfigError(
                "--dumps",
                f"{folder}: {host.name!r} is in supernode {host.supernode!r}, {hosts[0].name!r} in "
                f"{hosts[0].supernode!r}; the topology has both in {supernode.name!r}",
            )


def placeholder_hosts(supernodes: Sequence[Supernode], version: Version) -> tuple[Host, ...]:
    """Return hosts as a topology describes them, with addresses that no network routes.

    SDIDs and ids count from 0, as in the HCCL guide's examples; so do the ports of 2.0.
    """
    addresses = map(str, chain.from_iterable(net.hosts() for net in PLACEHOLDERS))
    hosts: list[Host] = []
    for supernode in supernodes:
        n = supernode.devices_per_host
        for i, name in enumerate(host_names(supernode)):
            devices = tuple(
                Device(
                    rank_id=d,
                    device_id=d,
                    device_ip=next(addresses) if version != "2.0" else None,
                    super_device_id=i * n + d if version == "1.2" else None,
                    local_id=d if version == "2.0" else None,
                    levels=_levels(name, supernode.name, addresses) if version == "2.0" else (),
                )
                for d in range(n)
            )
            hosts.append(Host(name=name, supernode=supernode.name, devices=devices))
    return tuple(hosts)


def _levels(host: str, supernode: str, addresses: Iterator[str]) -> tuple[Level, ...]:
    inner, outer = (
        Address(addr_type="IPV6" if ":" in addr else "IPV4", addr=addr, ports=ports)
        for addr, ports in ((next(addresses), p) for p in PLACEHOLDER_PORTS)
    )
    return (
        Level(net_layer=0, net_instance_id=host, net_type="TOPO_FILE_DESC", addresses=(inner,)),
        Level(net_layer=1, net_instance_id=supernode, net_type="CLOS", addresses=(outer,)),
    )
