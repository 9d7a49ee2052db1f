"""What each command of a dump printed, as values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from v4_ascend.supernode.ranktable.findings import ip
from v4_ascend.supernode.ranktable.sections import Section

Generation = Literal["A2", "A3", "950"]


@dataclass(frozen=True)
class Row:
    """A device as `npu-smi info -m` lists it."""

    npu: int
    chip: int
    device_id: int
    name: str
    line: int


class Place(NamedTuple):
    """Where a device is in a supernode."""

    sdid: int
    supernode: str
    server: str


def read_rows(section: Section) -> list[Row]:
    """Read `npu-smi info -m`, whose columns differ by generation."""
    lines = section.filled()
    columns = re.split(r"\s{2,}", lines[0].text.strip())
    device_id = "Chip Phy-ID" if "Chip Phy-ID" in columns else "Chip Logic ID"
    if missing := [c for c in ("NPU ID", "Chip ID", device_id, "Chip Name") if c not in columns]:
        section.refuse(f"must have a column {missing[0]!r}, has {columns}", lines[0])
    rows: list[Row] = []
    for line in lines[1:]:
        words = line.text.split(None, len(columns) - 1)
        if len(words) != len(columns):
            section.refuse(f"must have {len(columns)} columns, got {line.text.strip()!r}", line)
        row = dict(zip(columns, words, strict=True))
        if row["Chip Name"].strip().lower() == "mcu":  # the board's controller computes nothing
            continue
        numbers = [row[c] for c in ("NPU ID", "Chip ID", device_id)]
        if not all(n.isascii() and n.isdigit() for n in numbers):
            section.refuse(f"must have numbers as ids, got {line.text.strip()!r}", line)
        npu, chip, device = map(int, numbers)
        if any(device == r.device_id or (npu, chip) == (r.npu, r.chip) for r in rows):
            section.refuse(f"device {device} (NPU {npu}, chip {chip}) comes a second time", line)
        rows.append(Row(npu, chip, device, row["Chip Name"].strip(), line.number))
    return rows


def generation_of(rows: list[Row], section: Section) -> Generation:
    """Tell the generation by the chips' names, which must agree."""
    if not rows:
        section.refuse("has no devices; is it cut?")
    found = {r.line: _named(r, section) for r in rows}
    first = found[rows[0].line]
    for r in rows:
        if found[r.line] != first:
            section.refuse(f"{r.name} beside {rows[0].name}; a dump is of one host", r.line)
    if first == "A3":
        for r in rows:
            if not any(x.npu == r.npu and x.chip == r.chip ^ 1 for x in rows):
                what = f"NPU {r.npu} has chip {r.chip} and not chip {r.chip ^ 1}; is it cut?"
                section.refuse(what, r.line)
    return first


def _named(row: Row, section: Section) -> Generation:
    if "Ascend950" in row.name:
        return "950"
    if "910B" in row.name:
        return "A2"
    if "Ascend910" not in row.name:
        section.refuse(f"{row.name!r} is no Ascend910B, Ascend910 (A3) or Ascend950", row.line)
    return "A3"


def read_place(section: Section) -> Place:
    """Read `npu-smi info -t spod-info`."""
    pairs = section.pairs(("SDID", "Super Pod Size", "Super Pod ID", "Server Index"))
    sdid, line = pairs["SDID"]
    if not (sdid.isascii() and sdid.isdigit()):
        section.refuse(f"SDID must be a number, got {sdid!r}", line)
    return Place(int(sdid), pairs["Super Pod ID"][0], pairs["Server Index"][0])


def read_ip(section: Section) -> str:
    """Read `hccn_tool -ip -g`."""
    address, line = section.pairs(("ipaddr", "netmask"))["ipaddr"]
    try:
        return ip(4, 6)(address)
    except ValueError as e:
        section.refuse(f"ipaddr must be {e}, got {address!r}", line)


def read_ports(section: Section) -> dict[str, bool]:
    """Read `hccn_tool -g -dev_info`: the ports ``die/port``, and whether each is up."""
    ports: dict[str, bool] = {}
    for line, row in section.table(("UdieID", "PortID", "Link Status")):
        die, port, link = row["UdieID"], row["PortID"], row["Link Status"]
        if not re.fullmatch(r"[0-9]+/[0-9]+", f"{die}/{port}") or link not in ("UP", "DOWN"):
            section.refuse(f"must have a die, a port and UP or DOWN, got {line.text!r}", line)
        ports[f"{die}/{port}"] = link == "UP"
    return ports
