"""What a check found, and what every check is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from v4_ascend.deploy.doctor.facts import Facts

Level = Literal["blocker", "warning", "hint", "ok", "not-applicable"]


class Finding(msgspec.Struct, frozen=True):
    """One line of the report.

    Attributes:
        check: ``area.name``, the same in every version.
        what: the sentence, with the value.
        expected: what would be right.
        next_step: a command where one helps.
        source: where the rule or threshold is from; ours say why.
    """

    level: Level
    host: str
    check: str
    what: str
    value: str = ""
    expected: str = ""
    next_step: str = ""
    source: str = ""


@dataclass(frozen=True)
class Expected:
    """What a deployment needs of each host.

    Attributes:
        kind: of devices; `family` is that of the device profile, None if any will do.
        n_devices: on each host, None if any number will do.
        n_ranks: of all hosts.
        memory_utilisation: the part of a device's memory that must be free.
        emulated: the devices are processes of the CPU.
        engine: ``native | vllm``.
        supernode: the name of its own in the topology.
        has_topology: False where a host is only looked at.
    """

    kind: str = ""
    family: str | None = None
    n_devices: int | None = None
    n_ranks: int = 1
    n_hosts: int = 1
    memory_utilisation: float = 0.92
    emulated: bool = False
    engine: str = "native"
    supernode: str = ""
    has_topology: bool = False


@dataclass(frozen=True)
class Host:
    """One host's facts and what is expected of them: what a check judges."""

    name: str
    facts: Facts
    expected: Expected
    skew_s: float = 0.0

    @property
    def kind(self) -> str:
        """The kind of devices: the topology's, or what the host has."""
        if self.expected.emulated:
            return "cpu"
        if self.expected.kind:
            return self.expected.kind
        if "npu-smi info" in self.facts.commands:
            return "npu"
        return "cuda" if any(c.startswith("nvidia-smi") for c in self.facts.commands) else "cpu"

    def says(
        self,
        level: Level,
        check: str,
        what: str,
        *,
        value: object = "",
        expected: str = "",
        next_step: str = "",
        source: str = "",
    ) -> Finding:
        """Return a finding about this host."""
        return Finding(level, self.name, check, what, str(value), expected, next_step, source)


Check = Callable[[Host], Iterable[Finding]]
AcrossCheck = Callable[[Sequence[Host]], Iterable[Finding]]


def odd_ones(hosts: Sequence[Host], value: Callable[[Host], str]) -> str:
    """Say who has which value, where they differ; nothing where all agree.

    Hosts without a value are left out: another check misses it.
    """
    by_value: dict[str, list[str]] = {}
    for host in hosts:
        if found := value(host):
            by_value.setdefault(found, []).append(host.name)
    if len(by_value) < 2:
        return ""
    return "; ".join(f"{v} on {', '.join(names)}" for v, names in sorted(by_value.items()))
