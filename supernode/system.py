"""The machines of a plan: devices in rank order, and what joins any group of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from v4_ascend.config.devices import DeviceProfile, Figure, Level, Link, device_profile
from v4_ascend.config.topology import GivenLevel, GivenLink, Pool, Supernode, Topology
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.plan import Role

GIVEN = "the topology file"


@dataclass(frozen=True, slots=True)
class Hop:
    """One level of the fabric as seen from a device: how many peers it reaches through it."""

    name: str
    n_peers: float
    link: Link


@dataclass(frozen=True)
class System:
    """Devices of one role. Device i lies in host ``i // devices_per_host``, supernodes in order.

    `hosts` has a name for each host; `levels` goes outwards, each counted from a supernode's
    first device, and `inter` joins what no level does.
    """

    profile: DeviceProfile
    role: Role
    hosts: tuple[str, ...]
    devices_per_host: int
    supernode_sizes: tuple[int, ...]
    supernode_names: tuple[str, ...]
    levels: tuple[tuple[str, Level], ...]
    inter: Link | None

    @property
    def n_devices(self) -> int:
        """Devices of all supernodes."""
        return sum(self.supernode_sizes)

    def host_of(self, device: int) -> str:
        """Name the host of a device."""
        return self.hosts[device // self.devices_per_host]

    def supernode_of(self, device: int) -> int:
        """Return which supernode a device is in."""
        end = 0
        for i, size in enumerate(self.supernode_sizes):
            end += size
            if device < end:
                return i
        raise IndexError(device)

    def shrunk(self, n_devices: int) -> System:
        """Return the system of the first devices alone."""
        sizes, left = [], n_devices
        for size in self.supernode_sizes:
            sizes.append(min(size, left))
            left -= sizes[-1]
        n_hosts = -(-n_devices // self.devices_per_host)
        return replace(
            self,
            hosts=self.hosts[:n_hosts],
            supernode_sizes=tuple(s for s in sizes if s),
        )

    def hops(self, group_size: int, stride: int = 1, start: int = 0) -> tuple[Hop, ...]:
        """Say through which levels a device of a group reaches its peers.

        The group is `group_size` devices from `start` on, `stride` apart; the figures are the
        mean over its members.
        """
        members = [self._place(start + stride * i) for i in range(group_size)]
        hops, inside = [], 1.0
        for name, level in self.levels:
            together = _together(members, level.n_devices)
            if together > inside:
                hops.append(Hop(name, together - inside, level))
                inside = together
        if inside < group_size:
            if self.inter is None:
                raise ConfigError(
                    "cluster.inter",
                    f"no link joins {group_size} devices of {self.profile.name}; "
                    "give {bytes_per_s, latency_s}",
                )
            hops.append(Hop("inter", group_size - inside, self.inter))
        return tuple(hops)

    def _place(self, device: int) -> tuple[int, int]:
        """Return a device's supernode and its number there."""
        supernode = self.supernode_of(device)
        return supernode, device - sum(self.supernode_sizes[:supernode])


def _together(members: Sequence[tuple[int, int]], size: int) -> float:
    """Mean number of members, itself included, in the same group of `size` devices."""
    counts = Counter((supernode, local // size) for supernode, local in members)
    return sum(n * n for n in counts.values()) / len(members)


def systems(topology: Topology) -> tuple[System, ...]:
    """Resolve a topology into one system, or one for prefill and one for decode.

    Raises:
        ConfigError: a supernode is larger than the fabric that would make it one.
    """
    t = topology
    by_name = {s.name: s for s in t.cluster.supernodes}
    if not t.cluster.pools:
        return (_system(t, tuple(by_name.values()), "both", None),)
    return tuple(
        _system(t, tuple(by_name[n] for n in pool.supernodes), pool.role, pool)
        for pool in sorted(t.cluster.pools, key=lambda p: p.role, reverse=True)
    )


def _system(
    topology: Topology, members: tuple[Supernode, ...], role: Role, pool: Pool | None
) -> System:
    where = topology.where("cluster.supernodes")
    device = pool.device if pool and pool.device is not None else topology.cluster.device
    profile = device_profile(device, topology.where("cluster.device"))
    per_host = {s.devices_per_host for s in members}
    if len(per_host) > 1:
        raise ConfigError(
            where, f"supernodes of one pool must have equal hosts, got {sorted(per_host)} devices"
        )
    return System(
        profile=profile,
        role=role,
        hosts=tuple(h for s in members for h in host_names(s)),
        devices_per_host=per_host.pop(),
        supernode_sizes=tuple(s.n_devices for s in members),
        supernode_names=tuple(s.name for s in members),
        levels=_levels(topology, profile),
        inter=_inter(topology, profile),
    )


def host_names(supernode: Supernode) -> tuple[str, ...]:
    """Return the hosts' names, made up from the supernode's where only their number is given."""
    if supernode.hosts is not None:
        return supernode.hosts
    n = supernode.host_count or 0
    width = len(str(n - 1))
    return tuple(f"{supernode.name}-host{i:0{width}d}" for i in range(n))


def _levels(topology: Topology, profile: DeviceProfile) -> tuple[tuple[str, Level], ...]:
    given = topology.cluster.fabric
    if not given:
        return tuple(profile.fabric.items())
    levels = []
    for name, level in given.items():
        known = profile.fabric.get(name)
        if isinstance(level, GivenLevel):
            levels.append((name, Level(n_devices=level.n_devices, **_figures(level))))
        elif known is not None:
            levels.append((name, known.model_copy(update={"n_devices": level})))
        else:
            raise ConfigError(
                topology.where(f"cluster.fabric.{name}"),
                f"device {profile.name} knows no level {name!r} (it knows "
                f"{', '.join(profile.fabric) or 'none'}); give "
                "{n_devices, bytes_per_s, latency_s}",
            )
    # The profile's wider levels still join what the file does not mention.
    widest = max(topology.cluster.level_sizes.values())
    outer = [(n, v) for n, v in profile.fabric.items() if n not in given and v.n_devices > widest]
    return (*levels, *outer)


def _inter(topology: Topology, profile: DeviceProfile) -> Link | None:
    given = topology.cluster.inter
    return profile.inter if given is None else Link(**_figures(given))


def _figures(given: GivenLink) -> dict[str, Figure]:
    return {
        "bytes_per_s": Figure(value=given.bytes_per_s, label="cited", source=GIVEN),
        "latency_s": Figure(value=given.latency_s, label="cited", source=GIVEN),
    }
