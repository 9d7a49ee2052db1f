"""What vendor commands and system files say, read from their text.

Nothing here raises: a line that is not understood is left out, and a check that misses it says so.
Samples with their origin: tests/data/doctor.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

# A2 and A3: "| 0     910B2  | OK  | 98.4 ..."; 950: "| 0      | Ascend950PR  | OK  | 195.6 ...".
_NPU = re.compile(r"\|\s*(\d+)\s+\|?\s*((?:Ascend|910)\S*)\s*\|\s*(\S+)\s*\|")
# The second line ends in HBM used and total, in MB; A3 adds the physical id after the chip.
_CHIP = re.compile(r"\|\s*(\d*)\s*(\d*)\s*\|(?:\s*\|)?\s*(\S+)\s*\|.*?(\d+)\s*/\s*(\d+)\s*\|\s*$")
_PROCESS = re.compile(r"\|\s*(\d+)\s+(?:(\d+)\s+|)\|\s*(\d+)\s*\|\s*(\S+)\s*\|\s*(\d+)\s*\|\s*$")
NVIDIA_FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used",
                 "ecc.errors.uncorrected.volatile.total")  # fmt: skip


@dataclass(frozen=True)
class Npu:
    """A row of `npu-smi info`: one device. Memory in MB, as printed.

    `processes` are ``pid name`` of what runs on it.
    """

    npu: int
    chip: int
    name: str
    health: str
    used_mb: int
    total_mb: int
    processes: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """Whose rules it follows: hixl's rule by the chip's name."""
        if "950" in self.name:
            return "950"
        return "a2" if self.name.startswith("910B") or "910B" in self.name else "a3"


def npus(text: str) -> list[Npu]:
    """Read the two tables of `npu-smi info`, in the layouts of A2, A3 and 950."""
    rows: list[Npu] = []
    running: dict[tuple[int, int], list[str]] = {}
    started: re.Match[str] | None = None
    for line in text.splitlines():
        if found := _PROCESS.match(line):
            npu, chip, pid, name, _ = found.groups()
            running.setdefault((int(npu), int(chip or 0)), []).append(f"{pid} {name}")
        elif found := _NPU.match(line):
            started = found
        elif started is not None and (found := _CHIP.match(line)):
            chip, _, _, used, total = found.groups()
            npu, name, health = started.groups()
            rows.append(Npu(int(npu), int(chip or 0), name, health, int(used), int(total)))
            started = None
    return [
        Npu(r.npu, r.chip, r.name, r.health, r.used_mb, r.total_mb,
            tuple(running.get((r.npu, r.chip), ())))
        for r in rows
    ]  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A row of `nvidia-smi --query-gpu`; `ecc_errors` is None where ECC is off."""

    index: int
    name: str
    driver: str
    total_mb: int
    used_mb: int
    ecc_errors: int | None


def gpus(text: str) -> list[Gpu]:
    """Read ``nvidia-smi --query-gpu=<NVIDIA_FIELDS> --format=csv,noheader,nounits``."""
    rows = []
    for cells in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(cells) == len(NVIDIA_FIELDS) and cells[0].isdigit() and cells[3].isdigit():
            ecc = int(cells[5]) if cells[5].isdigit() else None
            used = int(cells[4]) if cells[4].isdigit() else 0
            rows.append(Gpu(int(cells[0]), cells[1], cells[2], int(cells[3]), used, ecc))
    return rows


@dataclass(frozen=True)
class Place:
    """Where a device is in a supernode, as printed; a 950 has no `sdid`, and may have a chassis."""

    sdid: str | None
    pod: str
    server: str


def place(text: str) -> Place | None:
    """Read `npu-smi info -t spod-info`; None where a device is in no supernode."""
    said = pairs(text, ":")
    pod, server = said.get("Super Pod ID"), said.get("Server Index", said.get("Chassis ID"))
    if pod is None or server is None or not (pod + server).isdigit() or int(pod) == NO_POD:
        return None
    return Place(said.get("SDID"), pod, server)


NO_POD = 2**32 - 1  # an unsigned -1, as the driver's library has it for what is not set


def nvlinks(text: str) -> dict[int, tuple[int, int]]:
    """Read `nvidia-smi nvlink --status`: of each GPU, how many links are up, and how many it has.

    A link counts as up by its speed: other words than ``<inactive>`` are no sign of one.
    """
    found: dict[int, tuple[int, int]] = {}
    gpu = None
    for line in text.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            gpu = int(head[1])
        elif gpu is not None and (link := re.match(r"\s+Link \d+:\s*(.*)", line)):
            speed = re.match(r"([\d.]+) GB/s", link[1])
            up, total = found.get(gpu, (0, 0))
            found[gpu] = (up + int(speed is not None and float(speed[1]) > 0), total + 1)
    return found


def pinged(text: str) -> tuple[int, int]:
    """Read `hccn_tool -ping`: packets sent and come back, (0, 0) where it says neither."""
    found = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def pairs(text: str, separator: str = "=") -> dict[str, str]:
    """Read ``key=value`` or ``key : value`` lines; the first of a key counts."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, sep, value = line.partition(separator)
        if sep and key.strip():
            found.setdefault(key.strip(), value.strip())
    return found


def tls_switch(text: str) -> str | None:
    """Return ``0`` or ``1`` of `hccn_tool ... -tls -g`; None if there is none."""
    found = re.search(r"tls switch\[([01])\]", text)
    return found.group(1) if found else None


def after(text: str, label: str) -> str | None:
    """Return what follows ``label:`` on its line, as hccn_tool prints states."""
    found = re.search(rf"^\s*{re.escape(label)}\s*:\s*(.+?)\s*$", text, re.M)
    return found.group(1) if found else None


def ub_ports(text: str) -> dict[str, str]:
    """Read `hccn_tool -g -dev_info` of a 950: ``die/port`` and its link, UP or DOWN."""
    ports: dict[str, str] = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if "UdieID" in cells:
            columns = cells
        elif columns and len(cells) == len(columns):
            row = dict(zip(columns, cells, strict=True))
            if row["UdieID"].isdigit():
                ports[f"{row['UdieID']}/{row.get('PortID', '')}"] = row.get("Link Status", "")
    return ports


def meminfo(text: str) -> dict[str, int]:
    """Read /proc/meminfo: bytes, and counts where it has no unit."""
    found: dict[str, int] = {}
    for key, value in pairs(text, ":").items():
        words = value.split()
        if words and words[0].isdigit():
            found[key] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``9.1.0.B150`` is (9, 1, 0)."""
    found = re.match(r"\s*v?(\d+(?:\.\d+)*)", text)
    return tuple(int(n) for n in found.group(1).split(".")) if found else ()
