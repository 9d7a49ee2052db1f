"""HCCL's settings and rank table, before HCCL reads them."""

from __future__ import annotations

from collections.abc import Iterator

from v4_ascend.deploy.doctor.devices import family_of, npus_of
from v4_ascend.deploy.doctor.finding import Finding, Host
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.ranktable.file import parse_table

PORT_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
RESERVED = "/proc/sys/net/ipv4/ip_local_reserved_ports"
GUIDE = "HCCL user guide, environment variables"
RANGES = {
    "HCCL_CONNECT_TIMEOUT": (120, 7200),
    "HCCL_BUFFSIZE": (1, 1 << 20),
    "HCCL_EXEC_TIMEOUT": (0, 2147483647),
}
EXPANSION = {
    "a2": ("HOST", "HOST_TS", "AI_CPU", "AIV"),
    "a3": ("AI_CPU", "AICPU_CacheDisable", "AIV"),
    "950": ("AICPU_TS", "AI_CPU", "AICPU_CacheDisable", "AIV", "CCU_MS", "CCU_SCHED"),
}


def numbers(host: Host) -> Iterator[Finding]:
    """Settings that are numbers are numbers HCCL takes."""
    for name, (low, high) in RANGES.items():
        value = host.facts.env.get(name)
        if host.kind != "npu" or value is None:
            continue
        if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
            yield host.says(
                "blocker",
                "hccl.setting",
                f"{name} is {value!r}",
                value=value,
                expected=f"a number from {low} to {high}",
                next_step=f"unset {name}",
                source=f"{GUIDE}; EI0001",
            )


def expansion(host: Host) -> Iterator[Finding]:
    """The place collectives run in exists on this chip."""
    family, env = family_of(host) or "", host.facts.env
    if host.kind != "npu" or family not in EXPANSION:
        return
    mode = env.get("HCCL_OP_EXPANSION_MODE")
    if mode is not None and mode not in EXPANSION[family]:
        # A 950 refuses what it does not know, the others take their default without a word.
        yield host.says(
            "blocker" if family == "950" else "warning",
            "hccl.setting",
            f"HCCL_OP_EXPANSION_MODE is {mode!r} on {family.upper()}",
            value=mode,
            expected=" or ".join(EXPANSION[family]),
            next_step="export HCCL_OP_EXPANSION_MODE=AIV",
            source=GUIDE,
        )
    if family == "950" and env.get("HCCL_DETERMINISTIC") == "1":
        yield host.says(
            "blocker",
            "hccl.setting",
            "HCCL_DETERMINISTIC is '1' on 950",
            value="1",
            expected="unset: its reductions are always deterministic",
            next_step="unset HCCL_DETERMINISTIC",
            source=f"{GUIDE}; EI0001",
        )


def addresses(host: Host) -> Iterator[Finding]:
    """The address and interface HCCL is told to use are this host's."""
    env, interfaces = host.facts.env, host.facts.interfaces
    if host.kind != "npu":
        return
    own = [i.address for i in interfaces.values() if i.address]
    ip = env.get("HCCL_IF_IP")
    if ip is not None and ip not in own:
        yield host.says(
            "blocker",
            "hccl.address",
            f"HCCL_IF_IP is {ip}, no address of this host",
            value=ip,
            expected=" or ".join(own),
            next_step="unset HCCL_IF_IP: deploy gives each host its interface",
            source=GUIDE,
        )
    names = env.get("HCCL_SOCKET_IFNAME", "")
    if names and not names.startswith("^"):
        wanted = names.removeprefix("=").split(",")
        is_exact = names.startswith("=")
        if not any(n == w if is_exact else n.startswith(w) for n in interfaces for w in wanted):
            yield host.says(
                "blocker",
                "hccl.address",
                f"HCCL_SOCKET_IFNAME is {names}, which no interface matches",
                value=names,
                expected=", ".join(sorted(interfaces)),
                next_step="unset HCCL_SOCKET_IFNAME: deploy sets it",
                source=GUIDE,
            )


def base_ports(host: Host) -> Iterator[Finding]:
    """The ports HCCL listens on are not given to others by chance."""
    base = host.facts.env.get("HCCL_IF_BASE_PORT", "60000")
    given = host.facts.files.get(PORT_RANGE, "").split()
    if host.kind != "npu" or len(given) != 2 or not base.isdigit():
        return
    is_given = int(given[0]) <= int(base) + 31 and int(base) <= int(given[1])
    if is_given and not host.facts.files.get(RESERVED, "").strip():
        yield host.says(
            "hint",
            "hccl.ports",
            f"Linux may give HCCL's ports {base}-{int(base) + 31} to any process (EI0019)",
            value=" ".join(given),
            expected="them among the reserved ones",
            next_step=f"sysctl -w net.ipv4.ip_local_reserved_ports={base}-{int(base) + 31}",
            source=f"{GUIDE}: HCCL_IF_BASE_PORT",
        )


def visible(host: Host) -> Iterator[Finding]:
    """ASCEND_RT_VISIBLE_DEVICES leaves as many devices as are planned, and only real ones."""
    value = host.facts.env.get("ASCEND_RT_VISIBLE_DEVICES")
    if host.kind != "npu" or value is None:
        return
    ids, n_there = value.split(","), len(npus_of(host))
    wanted = host.expected.n_devices or 1
    is_wrong = [i for i in ids if not i.strip().isdigit() or (n_there and int(i) >= n_there)]
    if is_wrong or len(ids) < wanted:
        yield host.says(
            "blocker",
            "hccl.visible",
            f"ASCEND_RT_VISIBLE_DEVICES is {value!r}",
            value=value,
            expected=f"{wanted} ids below {n_there}",
            next_step="unset ASCEND_RT_VISIBLE_DEVICES",
            source=GUIDE,
        )


def rank_table(host: Host) -> Iterator[Finding]:
    """The rank table is a whole one, and of as many ranks as the plan's."""
    path = host.facts.env.get("RANK_TABLE_FILE", "")
    if host.kind != "npu" or not path:
        return

    def wrong(what: str, expected: str) -> Finding:
        return host.says(
            "blocker",
            "hccl.rank-table",
            what,
            value=path,
            expected=expected,
            next_step=f"v4-ascend ranktable validate {path}",
            source="HCCL guide, rank tables; torch_npu documentation",
        )

    if not path.startswith("/") or host.facts.table_is_link:
        is_link = "a link" if host.facts.table_is_link else "relative"
        yield wrong(f"RANK_TABLE_FILE {path} is {is_link}", "an absolute path, and no link")
        return
    text = host.facts.files.get(path)
    if text is None:
        yield wrong(f"RANK_TABLE_FILE {path} cannot be read", "a file")
        return
    try:
        table = parse_table(text, path)
    except ConfigError as e:
        yield wrong(str(e).splitlines()[0], "a table that keeps the rules")
        return
    n = sum(len(h.devices) for h in table.hosts)
    if host.expected.has_topology and n != host.expected.n_ranks:
        yield wrong(f"RANK_TABLE_FILE {path} has {n} ranks", f"{host.expected.n_ranks} ranks")
    else:
        yield host.says("ok", "hccl.rank-table", f"{path}: {n} ranks")


CHECKS = (numbers, expansion, addresses, base_ports, visible, rank_table)
