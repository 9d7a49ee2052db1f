"""Read a host from what `npu-smi` and `hccn_tool` printed on it, in one text file.

The outputs do not say which device they are of, so each follows the line of its command, as
a shell with ``set -x`` writes it. Output of other commands is passed over.

Source: hixl platform_detect.py and MindCluster's host parsers, which read the same commands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from v4_ascend.errors import ConfigError
from v4_ascend.supernode.ranktable.model import Device, Host
from v4_ascend.supernode.ranktable.outputs import (
    Generation,
    Place,
    generation_of,
    read_ip,
    read_place,
    read_ports,
    read_rows,
)
from v4_ascend.supernode.ranktable.sections import Section, sections_of

T = TypeVar("T")
Chips = dict[tuple[int, ...], int]  # the numbers a command names a device by, and its id
MAPPING, SUPERNODE, ADDRESS, PORTS = (
    "npu-smi info -m",
    "npu-smi info -t spod-info",
    "hccn_tool -ip -g",
    "hccn_tool -g -dev_info",
)
# Each generation has its own way to ask for addresses: another one is from another host.
_ASKED: dict[Generation, tuple[str, ...]] = {
    "A2": (ADDRESS,),
    "A3": (SUPERNODE, ADDRESS),
    "950": (SUPERNODE, PORTS),
}


@dataclass(frozen=True)
class Dump:
    """A host, and for each of its devices the ports that are there: whether each is up.

    Ranks count from 0 on the host.
    """

    file: str
    generation: Generation
    host: Host
    ports: dict[int, dict[str, bool]]


def read_dump(file: Path) -> Dump:
    """Read the dump of one host, which is named as its file.

    Raises:
        ConfigError: at ``file:line``, it is cut, mixed or not understood.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(str(file), f"cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(str(file), f"is not UTF-8 text: {e.reason}") from e
    return parse_dump(text, str(file), file.stem)


def parse_dump(text: str, file: str, host: str) -> Dump:
    """Read the text of a dump; `file` is its name in errors.

    Raises:
        ConfigError: at ``file:line``, it is cut, mixed or not understood.
    """
    sections = sections_of(text, file)
    mappings = [s for s in sections if s.asks(*MAPPING.split())]
    if not mappings:
        raise ConfigError(f"{file}:1", f"has no output of `{MAPPING}`; every dump needs it")
    if len(mappings) > 1:
        mappings[1].refuse(f"`{MAPPING}` comes a second time; a dump is of one host")
    rows = read_rows(mappings[0])
    generation = generation_of(rows, mappings[0])
    for kind in (SUPERNODE, ADDRESS, PORTS):
        other = next((s for s in sections if s.asks(*kind.split())), None)
        if other is not None and kind not in _ASKED[generation]:
            other.refuse(f"`{kind}` is not asked on {generation} ({rows[0].name}); is this mixed?")
    by_chip: Chips = {(r.npu, r.chip): r.device_id for r in rows}
    by_id: Chips = {(r.device_id,): r.device_id for r in rows}
    places = _each(sections, SUPERNODE, ("-i", "-c"), by_chip, read_place)
    ips = _each(sections, ADDRESS, ("-i",), by_id, read_ip)
    ports = _each(sections, PORTS, ("-i",), by_id, read_ports)
    devices = tuple(
        Device(
            rank_id=rank,
            device_id=r.device_id,
            device_ip=ips.get(r.device_id),
            super_device_id=places[r.device_id].sdid if places else None,
        )
        for rank, r in enumerate(sorted(rows, key=lambda r: r.device_id))
    )
    supernode = _supernode(sections, places)
    return Dump(file, generation, Host(name=host, supernode=supernode, devices=devices), ports)


def _each(
    sections: list[Section],
    kind: str,
    options: tuple[str, ...],
    devices: Chips,
    read: Callable[[Section], T],
) -> dict[int, T]:
    """Read the sections of one kind: none at all, or one for each device."""
    found: dict[int, T] = {}
    mine = [s for s in sections if s.asks(*kind.split())]
    for section in mine:
        key = tuple(section.option(o) for o in options)
        if key not in devices:
            section.refuse(f"is of no device that `{MAPPING}` lists; is this mixed or cut?")
        if devices[key] in found:
            section.refuse(f"comes a second time for device {devices[key]}; is this mixed?")
        found[devices[key]] = read(section)
    if mine and (missing := sorted(set(devices.values()) - set(found))):
        mine[-1].refuse(f"comes for other devices and not for device {missing[0]}; is it cut?")
    return found


def _supernode(sections: list[Section], places: dict[int, Place]) -> str | None:
    asked = [s for s in sections if s.asks(*SUPERNODE.split())]
    seen: list[Place] = []
    for section, place in zip(asked, places.values(), strict=True):
        if seen and place[1:] != seen[0][1:]:
            section.refuse(
                f"Super Pod ID and Server Index are {', '.join(place[1:])} and were "
                f"{', '.join(seen[0][1:])}; a dump is of one host"
            )
        if place.sdid in (p.sdid for p in seen):
            section.refuse(f"SDID {place.sdid} comes a second time; is this mixed?")
        seen.append(place)
    return seen[0].supernode if seen else None
