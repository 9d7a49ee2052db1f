"""Network: the devices' own ports, the hosts' addresses, clocks and ports, and HCCL's settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from v4_ascend.deploy.doctor import outputs
from v4_ascend.deploy.doctor.devices import family_of, npus_of
from v4_ascend.deploy.doctor.facts import Interface
from v4_ascend.deploy.doctor.finding import Finding, Host, Level, odd_ones

SKEW_BLOCKER_S = 10.0
SKEW_SOURCE = (
    "ours: which rank failed first is told by the times of log lines, and ranks are named within "
    "10 s of falling silent"
)
SKEW_WARNING_S = 1.0  # ours: logs of two hosts can no longer be laid beside each other


def _ports_level(host: Host) -> Level:
    """Within a host devices talk over its own fabric: a port that is down stops several hosts."""
    return "blocker" if host.expected.n_hosts > 1 else "warning"


def links(host: Host) -> Iterator[Finding]:
    """The devices' ports are up, healthy and have addresses (A2, A3: RoCE)."""
    if host.kind != "npu" or family_of(host) == "950" or not npus_of(host):
        return
    level, n_devices = _ports_level(host), host.expected.n_devices or len(npus_of(host))
    is_well = True
    for d in range(n_devices):
        for what, label, wanted in (
            ("link", "link status", "UP"),
            ("net_health", "net health status", "Success"),
            ("ip", "ipaddr", None),
        ):
            command = f"hccn_tool -i {d} -{what} -g"
            output = host.facts.commands.get(command)
            if output is None:
                if d == 0 and what == "link":
                    yield host.says(
                        level,
                        "network.hccn-tool",
                        "hccn_tool is not installed",
                        expected="the driver's tools, mounted into a container too",
                        next_step="docker run ... -v /usr/local/Ascend/driver:/usr/"
                        "local/Ascend/driver",
                        source="vllm-ascend tutorials",
                    )
                is_well = False
                continue
            found = outputs.after(output.text, label)
            if found is not None and (wanted is None or found == wanted):
                continue
            is_well = False
            said = found or (output.text.strip().splitlines() or ["nothing"])[-1].strip()
            # Init: nobody set an address to detect; the link itself may be well.
            is_soft = what == "net_health" and found == "Init"
            yield host.says(
                "warning" if is_soft else level,
                f"network.{what.replace('_', '-')}",
                f"NPU port {d}: {label} is {said}",
                value=said,
                expected=wanted or "an address",
                next_step=command,
                source="hccn_tool; HCCL guide: RoCE between hosts",
            )
    if is_well:
        yield host.says("ok", "network.links", f"{n_devices} NPU ports are up and have addresses")


def ub_links(host: Host) -> Iterator[Finding]:
    """A 950 has ports on UnifiedBus that are up, and its factory's description of them."""
    rows = npus_of(host)
    if host.kind != "npu" or family_of(host) != "950" or not rows:
        return
    n_devices = host.expected.n_devices or len(rows)
    if n_devices * host.expected.n_hosts == 1:
        yield host.says("not-applicable", "network.ub", "UnifiedBus: one device is used")
        return
    for r in rows[:n_devices]:
        command = f"hccn_tool -g -dev_info -i {r.npu}"
        output = host.facts.commands.get(command)
        ports = outputs.ub_ports(output.text) if output is not None else {}
        up = [p for p, state in ports.items() if state == "UP"]
        if up:
            continue
        what = f"no port of {len(ports)} is up" if ports else "hccn_tool lists no port"
        yield host.says(
            "blocker",
            "network.ub",
            f"NPU {r.npu}: {what}",
            value=0,
            expected="a UB or RoCE port that is UP",
            next_step=command,
            source="MindCluster's host parser for 950",
        )
    if "/etc/hccl_rootinfo.json" not in host.facts.files:
        yield host.says(
            "warning",
            "network.rootinfo",
            "/etc/hccl_rootinfo.json is not there",
            expected="the file of the factory, mounted into a container too",
            next_step="docker run ... -v /etc/hccl_rootinfo.json",
            source="vllm-ascend kv_pool.md 5.2.3",
        )


def tls_of(host: Host) -> dict[str, str]:
    """Return each device's TLS switch, by the command that said it."""
    found = {}
    for command, output in host.facts.commands.items():
        if "-tls" in command and (switch := outputs.tls_switch(output.text)) is not None:
            found[command] = switch
    return found


def tls(hosts: Sequence[Host]) -> Iterator[Finding]:
    """TLS is on for all devices of all hosts, or off for all."""
    switches = {(h.name, c): s for h in hosts for c, s in tls_of(h).items()}
    if not switches:
        return
    on = [who for who, switch in switches.items() if switch == "1"]
    off = [who for who, switch in switches.items() if switch == "0"]
    if not on or not off:
        what = f"TLS is {'on' if on else 'off'} for {len(switches)} devices"
        yield Finding("ok", "all hosts", "network.tls", what)
        return
    host, command = (on if len(on) <= len(off) else off)[0]
    if command.endswith("-tls -g"):  # a 950's tool sets it in another way
        command = command.removesuffix("-g") + f"-s enable {int(len(on) > len(off))}"
    yield Finding(
        "blocker",
        "all hosts",
        "network.tls",
        f"TLS is on for {_count(on)} and off for {_count(off)}",
        expected="one switch for all devices",
        next_step=f"{command}  # on {host}",
        source="HCCL EI0016: TLS mismatch",
    )


def _count(devices: Sequence[tuple[str, str]]) -> str:
    return f"{len(devices)} ({', '.join(sorted({host for host, _ in devices}))})"


def address(host: Host) -> Iterator[Finding]:
    """With several hosts, a host's name is one of its own addresses."""
    if host.expected.n_hosts == 1:
        return
    own = [i.address for i in host.facts.interfaces.values() if i.address]
    is_own = host.facts.address in own
    yield host.says(
        "ok" if is_own else "blocker",
        "network.address",
        f"{host.name} means {host.facts.address or 'nothing'} there, "
        f"which {'is' if is_own else 'is not'} its address",
        value=host.facts.address or "",
        expected=" or ".join(own) or "an address",
        next_step="correct /etc/hosts or the name in the topology",
        source="deploy/torchrun.py: ranks meet at these addresses",
    )


def peers(host: Host) -> Iterator[Finding]:
    """Every other host answers this one."""
    for peer, why in host.facts.unreachable.items():
        yield host.says(
            "blocker",
            "network.peers",
            f"{peer} cannot be reached from here: {why}",
            value=peer,
            expected="an answer, if only a refusal",
            next_step=f"ping {peer}  # on {host.name}; look at firewall and routes",
            source="ours: a TCP connection to port 1, which nobody listens on",
        )
    if host.expected.n_hosts > 1 and not host.facts.unreachable:
        yield host.says("ok", "network.peers", f"{host.expected.n_hosts - 1} other hosts answer")


def ports(host: Host) -> Iterator[Finding]:
    """The ports we listen on are free."""
    for port, why in host.facts.busy.items():
        yield host.says("blocker", "network.ports", why, value=port, expected="a free port")


def clocks(hosts: Sequence[Host]) -> Iterator[Finding]:
    """The hosts' clocks agree."""
    for h in hosts:
        if abs(h.skew_s) > SKEW_WARNING_S:
            level: Level = "blocker" if abs(h.skew_s) > SKEW_BLOCKER_S else "warning"
            way = "ahead of" if h.skew_s > 0 else "behind"
            yield h.says(
                level,
                "network.clock",
                f"its clock is {abs(h.skew_s):,.1f} s {way} the deploying host's",
                value=f"{h.skew_s:.1f}",
                expected=f"less than {SKEW_WARNING_S:g} s",
                next_step="chronyc makestep, or start an NTP client",
                source=SKEW_SOURCE,
            )
    if len(hosts) > 1 and all(abs(h.skew_s) <= SKEW_WARNING_S for h in hosts):
        yield Finding("ok", "all hosts", "network.clock", "the clocks agree")


def mtu(hosts: Sequence[Host]) -> Iterator[Finding]:
    """The interfaces that hosts meet on take packets of one size."""

    def of(host: Host) -> str:
        found = _meeting(host)
        return f"{found.mtu}" if found is not None else ""

    if odd := odd_ones(hosts, of):
        # TCP agrees on a size by itself, RDMA does not.
        level: Level = "warning" if all(h.kind == "cpu" for h in hosts) else "blocker"
        yield Finding(
            level,
            "all hosts",
            "network.mtu",
            f"the MTU differs: {odd}",
            odd,
            "one MTU",
            "ip link set dev IFACE mtu N",
            "ours: packets above the smaller one are lost without a word",
        )


def _meeting(host: Host) -> Interface | None:
    own = host.facts.interfaces.values()
    return next((i for i in own if i.address and i.address == host.facts.address), None)


CHECKS = (links, ub_links, address, peers, ports)
ACROSS = (tls, clocks, mtu)
