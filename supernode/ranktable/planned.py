"""A rank table and a plan: the hosts a table names, and the ranks a plan puts on them."""

from __future__ import annotations

from collections.abc import Sequence

from v4_ascend.config.devices import device_profile
from v4_ascend.config.topology import Supernode, Topology
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.planning import PoolPlan
from v4_ascend.supernode.ranktable.generation import generate, placeholder_hosts, version_for
from v4_ascend.supernode.ranktable.model import Host, RankTable, hosts_of

READ_BY = {"a2": ("1.0",), "a3": ("1.0", "1.2"), "950": ("2.0",)}


def with_hosts(topology: Topology, table: RankTable, file: str) -> Topology:
    """Return the topology with the hosts of a table in place of the numbers of hosts it gives.

    The table's hosts are taken in its order, supernode after supernode. Hosts the topology names
    stay where it has them.

    Raises:
        ConfigError: table and topology differ in hosts or devices, or the topology has in one
            supernode what the table has in two.
    """
    device = device_profile(topology.cluster.device, topology.where("cluster.device"))
    if table.version not in (reads := READ_BY.get(device.family, ())):
        raise ConfigError(
            topology.where("cluster.device"),
            f"{device.name} reads rank tables {' and '.join(reads) or 'of no version'}, {file} is "
            f"{table.version}; see `ranktable convert`",
        )
    (groups, per_host), where = hosts_of(table), topology.where("cluster.supernodes")
    names = [name for group in groups for name in group]
    asked = topology.cluster.supernodes
    n_asked = sum(s.n_devices // s.devices_per_host for s in asked)
    if len(names) != n_asked or any(s.devices_per_host != per_host for s in asked):
        sizes = ", ".join(sorted({str(s.devices_per_host) for s in asked}))
        raise ConfigError(
            where,
            f"{n_asked} hosts of {sizes} devices, {file} has {len(names)} of {per_host}",
        )
    left = [n for n in names if n not in {h for s in asked for h in s.hosts or ()}]
    supernode_of = {h.name: h.supernode for h in table.hosts}
    filled = []
    for supernode in asked:
        hosts = supernode.hosts or tuple(left[: supernode.host_count])
        if supernode.hosts is None:
            left = left[len(hosts) :]
        if unknown := [h for h in hosts if h not in supernode_of]:
            raise ConfigError(where, f"{file} has no host {unknown[0]!r}; it has {names[0]!r}, ...")
        if len({supernode_of[h] for h in hosts}) > 1 and table.supernodes:
            first, other = hosts[0], next(
                h for h in hosts if supernode_of[h] != supernode_of[hosts[0]]
            )  # fmt: skip
            raise ConfigError(
                where,
                f"supernode {supernode.name!r} would join hosts {first!r} of "
                f"{supernode_of[first]!r} and {other!r} of {supernode_of[other]!r} in {file}",
            )
        filled.append(
            Supernode(name=supernode.name, hosts=hosts, devices_per_host=supernode.devices_per_host)
        )
    cluster = topology.cluster.model_copy(update={"supernodes": tuple(filled)})
    return topology.model_copy(update={"cluster": cluster})


def table_for(
    pool: PoolPlan, supernodes: Sequence[Supernode], given: RankTable | None
) -> RankTable:
    """Return the table of the ranks of a pool's plan: given addresses, or planned ones.

    Raises:
        ConfigError: the device has no rank table, or the plan's hosts break its rules.
    """
    version = given.version if given is not None else version_for(pool.system.profile)
    hosts = given.hosts if given is not None else placeholder_hosts(supernodes, version)
    by_name = {h.name: h for h in hosts}
    used: list[Host] = []
    left = pool.chosen.parallel.world_size if pool.chosen else 0
    for name in pool.system.hosts:
        if left <= 0:
            break
        host = by_name[name]
        used.append(host.model_copy(update={"devices": host.devices[:left]}))
        left -= len(host.devices)
    return generate(used, version, given.status if given is not None else "planned")
