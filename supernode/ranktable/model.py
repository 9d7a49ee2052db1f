"""A rank table of any version in one frozen form: hosts, their devices, their addresses."""

from __future__ import annotations

from itertools import groupby
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from v4_ascend.errors import ConfigError

Version = Literal["1.0", "1.2", "2.0"]
VERSIONS: tuple[Version, ...] = ("1.0", "1.2", "2.0")
Status = Literal["completed", "planned"]
HOST_PORT = "d2h"  # among the ports of a 2.0 address: the host's NIC, reached through PCIe


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Address(_Frozen):
    """Where a rank is reached on one network layer; ports are ``die/port`` or ``d2h``."""

    addr_type: Literal["EID", "IPV4", "IPV6"]
    addr: str
    ports: tuple[str, ...] = Field(min_length=1)
    plane_id: str | None = None


class Level(_Frozen):
    """One network layer of a rank: layer 0 joins a board or cabinet, layer 1 a supernode."""

    net_layer: int
    net_instance_id: str
    net_type: Literal["TOPO_FILE_DESC", "CLOS"]
    net_attr: str | None = None
    addresses: tuple[Address, ...] = ()


class Device(_Frozen):
    """One entry of a host's device list, which is one rank. `local_id` and `levels` are 2.0's."""

    rank_id: int
    device_id: int
    device_ip: str | None = None
    device_port: int | None = None
    host_port: int | None = None
    super_device_id: int | None = None
    backup_device_ip: str | None = None
    backup_device_port: int | None = None
    local_id: int | None = None
    levels: tuple[Level, ...] = ()


class Host(_Frozen):
    """One machine. `supernode` is None where the table does not say one."""

    name: str
    host_ip: str | None = None
    supernode: str | None = None
    devices: tuple[Device, ...] = Field(min_length=1)


class RankTable(_Frozen):
    """All ranks of a job. A planned table has placeholder addresses: HCCL must not read it."""

    version: Version
    status: Status = "completed"
    hosts: tuple[Host, ...] = Field(min_length=1)

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices of all hosts."""
        return tuple(d for host in self.hosts for d in host.devices)

    @property
    def supernodes(self) -> tuple[str, ...]:
        """Names of the supernodes, in the order the table meets them."""
        return tuple(dict.fromkeys(h.supernode for h in self.hosts if h.supernode is not None))


def hosts_of(table: RankTable) -> tuple[tuple[tuple[str, ...], ...], int]:
    """Return the host names of each supernode, and how many devices a host has.

    A host without a supernode is one by itself: its board is the only fast fabric it has.

    Raises:
        ConfigError: hosts differ in their number of devices, which a topology cannot say.
    """
    of_first = table.hosts[0]
    for host in table.hosts:
        if len(host.devices) != len(of_first.devices):
            raise ConfigError(
                "rank table",
                f"host {host.name!r} has {len(host.devices)} devices, {of_first.name!r} has "
                f"{len(of_first.devices)}; a topology has one devices_per_host",
            )
    order = list(table.supernodes)
    alone = [(h.name,) for h in table.hosts if h.supernode is None]
    joined = sorted(
        (h for h in table.hosts if h.supernode is not None),
        key=lambda h: order.index(str(h.supernode)),
    )
    groups = [tuple(h.name for h in g) for _, g in groupby(joined, key=lambda h: h.supernode)]
    return (*groups, *alone), len(of_first.devices)
