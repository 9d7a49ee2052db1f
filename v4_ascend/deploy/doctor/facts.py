"""What is asked of a host, and what it answers: texts as they were printed, not yet read."""

from __future__ import annotations

import msgspec


class Question(msgspec.Struct, frozen=True):
    """What a host must know to gather its facts.

    Attributes:
        host: its name in the topology.
        kind: of devices, ``cpu | cuda | npu``; empty: whatever is there.
        peers: the other hosts' names.
        ports: those that must be free, by address to bind; port 0 is always free.
        checkpoint: a folder, None where there is none to look at.
        compare: whether the checkpoint's headers are to be digested.
        env: settings of the deploying shell that its ranks will have.
        probe: the backend whose operators are tried, empty for none, ``auto`` by the devices found.
        commands: pings of other hosts' devices, answered beside what applies to `kind`.
        timeout_s: of the whole answer.
    """

    host: str
    kind: str = ""
    peers: tuple[str, ...] = ()
    ports: tuple[tuple[str, int], ...] = ()
    checkpoint: str | None = None
    compare: bool = False
    env: dict[str, str] = {}
    probe: str = ""
    commands: tuple[str, ...] = ()
    timeout_s: float = 60.0


class Output(msgspec.Struct, frozen=True):
    """What a command printed; `code` is None where it did not end in time."""

    code: int | None
    text: str


class Interface(msgspec.Struct, frozen=True):
    """A network interface: its IPv4 address, if any, and its MTU in bytes."""

    address: str | None
    mtu: int


class Space(msgspec.Struct, frozen=True):
    """A file system, in bytes."""

    total: int
    free: int


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint's folder: what is wrong with it, or its bytes and digest of headers."""

    problem: str = ""
    n_bytes: int = 0
    digest: str = ""


class Probed(msgspec.Struct, frozen=True):
    """One operator's tiny call: ``passed | failed | refused | missing``, and why."""

    op: str
    outcome: str
    why: str = ""


class Probe(msgspec.Struct, frozen=True):
    """The tiny calls of one backend. `at` is the operator that was running when it ended badly."""

    backend: str
    results: tuple[Probed, ...] = ()
    at: str = ""
    problem: str = ""


class Facts(msgspec.Struct, frozen=True):
    """One host as it describes itself.

    Attributes:
        version: of v4-ascend.
        machine, kernel: of ``uname``.
        clock: seconds since the epoch, read while answering.
        commands: by command line; what is not installed is not there.
        files: by path; what does not exist is not there.
        nodes: names in ``/dev`` that devices have.
        packages: versions by distribution name.
        limits: soft limits, -1 for unlimited.
        address: what the host's own name means, None if nothing.
        busy: why a port asked for cannot be had, by number.
        unreachable: why a peer does not answer, by name.
        spaces: file systems by what they are for, ``state`` and ``shm``.
        table_is_link: whether RANK_TABLE_FILE names a link.
    """

    version: str
    python: str
    machine: str
    kernel: str
    clock: float
    commands: dict[str, Output] = {}
    files: dict[str, str] = {}
    nodes: tuple[str, ...] = ()
    packages: dict[str, str] = {}
    env: dict[str, str] = {}
    limits: dict[str, int] = {}
    interfaces: dict[str, Interface] = {}
    address: str | None = None
    busy: dict[int, str] = {}
    unreachable: dict[str, str] = {}
    spaces: dict[str, Space] = {}
    checkpoint: Checkpoint | None = None
    table_is_link: bool = False
    probe: Probe | None = None


class Answer(msgspec.Struct, frozen=True):
    """What came back for a host.

    Attributes:
        facts: None if it could not be asked, which `problem` tells.
        skew_s: seconds by which its clock must be off ours at least; 0 if they may agree.
    """

    host: str
    facts: Facts | None = None
    problem: str = ""
    skew_s: float = 0.0
