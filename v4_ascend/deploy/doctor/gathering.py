"""Gather a host's facts: run commands, read files, try sockets. Judges nothing.

What it reads and runs goes through `Machine`, so that a test may put a recorded host in its place.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

from v4_ascend import __version__
from v4_ascend.deploy.doctor import outputs
from v4_ascend.deploy.doctor.checkpoint import look_at
from v4_ascend.deploy.doctor.facts import Facts, Interface, Output, Question, Space
from v4_ascend.deploy.doctor.operators import run_probe
from v4_ascend.deploy.port import require_free
from v4_ascend.deploy.state import state_root
from v4_ascend.deploy.torchrun import addresses
from v4_ascend.errors import PortInUseError

PEER_SECONDS = 2.0  # ours: a host of the same cluster answers in milliseconds
UNREACHED = 1  # tcpmux: nobody listens there, and a host that is there refuses
PACKAGES = ("torch", "torch_npu", "triton-ascend", "vllm", "vllm_ascend", "mindspore", "triton")
ENV = ("HCCL_", "ASCEND_", "RANK_TABLE_FILE", "CUDA_VISIBLE_DEVICES", "NCCL_", "GLOO_")
NODES = re.compile(r"davinci\d+|davinci_manager|devmm_svm|hisi_hdc|ummu|uburma|nvidia\d+")
DRIVER, INSTALL = "/usr/local/Ascend/driver/version.info", "/etc/ascend_install.info"
TOOLKITS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
FILES = (
    *(DRIVER, INSTALL, "/etc/hccn.conf", "/etc/hccl_rootinfo.json", "/proc/meminfo"),
    *("/proc/sys/kernel/numa_balancing", "/proc/sys/vm/swappiness", *CGROUP_LIMITS),
    *("/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/net/ipv4/ip_local_reserved_ports"),
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
)
LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC,
          "memlock": resource.RLIMIT_MEMLOCK}  # fmt: skip
# Where drivers put their tools: ssh without a login shell has none of these on PATH.
PLACES = ("usr/local/bin", "usr/local/sbin", "usr/local/Ascend/driver/tools")
GPU_QUERY = (
    f"nvidia-smi --query-gpu={','.join(outputs.NVIDIA_FIELDS)} --format=csv,noheader,nounits"
)
NVLINK, SPOD = "nvidia-smi nvlink --status", "npu-smi info -t spod-info"
PING = re.compile(r"hccn_tool -i \d+ -ping -g address [\d.]+")


def ping(device: int, address: str) -> str:
    """Return the command by which a device of A2 or A3 asks another's address."""
    return f"hccn_tool -i {device} -ping -g address {address}"


class Machine:
    """The files and commands of the machine we run on, each command within `deadline`."""

    def __init__(self, deadline: float, root: Path = Path("/")) -> None:
        self.root = root
        self._deadline = deadline

    def read(self, path: str) -> str | None:
        """Return a file's text; None if it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def run(self, command: str) -> Output | None:
        """Run a command of ours, never one of a user's; None if it is not installed."""
        tool, *options = command.split()
        found = (self.root / place / tool for place in PLACES)
        words = [shutil.which(tool) or next((str(f) for f in found if f.exists()), tool), *options]
        left = self._deadline - time.monotonic()
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=max(left, 0.1),
                check=False,
            )
        except (FileNotFoundError, PermissionError):
            return None
        except subprocess.TimeoutExpired as e:
            text = e.stdout.decode(errors="replace") if isinstance(e.stdout, bytes) else ""
            return Output(None, text)
        return Output(done.returncode, done.stdout)

    def nodes(self) -> tuple[str, ...]:
        """Return the device nodes, ``uburma/`` and others that are folders too."""
        dev = self.root / "dev"
        return tuple(sorted(n for n in os.listdir(dev) if NODES.fullmatch(n)))


def gather(question: Question, machine: Machine | None = None) -> Facts:
    """Answer a question about this host, within its time."""
    deadline = time.monotonic() + question.timeout_s
    machine = machine or Machine(deadline)
    env = {k: v for k, v in os.environ.items() if k.startswith(ENV)} | question.env
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(_unreachable, question.peers)
        commands = _commands(machine, question.kind, question.commands)
        unreachable = dict(answers)
    backend = question.probe
    if backend == "auto":
        backend = _backend(commands)
    probe = run_probe(backend, deadline - time.monotonic()) if backend else None
    table = env.get("RANK_TABLE_FILE", "")
    paths = [*FILES, *_toolkit_files(env), *([table] if table else [])]
    return Facts(
        version=__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        kernel=platform.release(),
        commands=commands,
        files={p: text for p in paths if (text := machine.read(p)) is not None},
        nodes=machine.nodes(),
        packages=_packages(),
        env=env,
        limits={k: resource.getrlimit(v)[0] for k, v in LIMITS.items()},
        interfaces=_interfaces(machine),
        address=_address(question.host),
        busy=_busy(question.ports),
        unreachable={k: v for k, v in unreachable.items() if v},
        spaces=dict(_spaces()),
        checkpoint=look_at(question.checkpoint, digest=question.compare),
        table_is_link=Path(table).is_symlink() if table else False,
        probe=probe,
        clock=time.time(),
    )


def _commands(machine: Machine, kind: str, pings: tuple[str, ...]) -> dict[str, Output]:
    """Run what applies to the devices asked for, or to those that are there."""
    found: dict[str, Output] = {}

    def keep(commands: Iterable[str]) -> None:
        lines = list(commands)
        with ThreadPoolExecutor(8) as pool:
            for line, output in zip(lines, pool.map(machine.run, lines), strict=True):
                if output is not None:
                    found[line] = output

    keep({"npu": ["npu-smi info"], "cuda": [GPU_QUERY], "cpu": []}.get(
        kind, ["npu-smi info", GPU_QUERY]))  # fmt: skip
    keep(p for p in pings if PING.fullmatch(p))  # whoever asks: nothing else is run for him
    if GPU_QUERY in found:
        keep([NVLINK])
    rows = outputs.npus(found["npu-smi info"].text) if "npu-smi info" in found else []
    if rows:
        keep([f"npu-smi info -t board -i {rows[0].npu}"])
        if rows[0].family == "950":
            keep(f"hccn_tool -g -{what} -i {r.npu}" for r in rows for what in ("dev_info", "tls"))
        else:
            whats = ("link", "net_health", "ip", "tls")
            keep(f"hccn_tool -i {d} -{what} -g" for d in range(len(rows)) for what in whats)
        if rows[0].family != "a2":
            keep(f"{SPOD} -i {r.npu} -c {r.chip}" for r in rows)
    return found


def _backend(commands: dict[str, Output]) -> str:
    """Return the backend of the devices whose tool is there."""
    if "npu-smi info" in commands:
        return "ascend"
    return "cuda" if GPU_QUERY in commands else "cpu"


def _toolkit_files(env: dict[str, str]) -> list[str]:
    """Where CANN says its version: its set_env.sh names the folder, else the usual ones."""
    homes = [env["ASCEND_HOME_PATH"]] if "ASCEND_HOME_PATH" in env else list(TOOLKITS)
    arch = f"{platform.machine()}-linux"
    return [f"{home}/{arch}/ascend_toolkit_install.info" for home in homes]


def _packages() -> dict[str, str]:
    wanted = {p.replace("_", "-").lower(): p for p in PACKAGES}
    found: dict[str, str] = {}
    for d in distributions():
        name = (d.name or "").replace("_", "-").lower()
        if name in wanted:
            found.setdefault(wanted[name], d.version)
    return found


def _interfaces(machine: Machine) -> dict[str, Interface]:
    found = {}
    for name, address in addresses():
        mtu = machine.read(f"/sys/class/net/{name}/mtu")
        found[name] = Interface(address, int(mtu or 0))
    return found


def _address(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _unreachable(peer: str) -> tuple[str, str]:
    """Try a peer at a port where nobody listens: a host that is there refuses at once."""
    try:
        with socket.create_connection((peer, UNREACHED), timeout=PEER_SECONDS):
            return peer, ""
    except ConnectionRefusedError:
        return peer, ""
    except TimeoutError:
        return peer, f"no answer in {PEER_SECONDS:g} s"
    except OSError as e:
        return peer, e.strerror or str(e)


def _busy(ports: Iterable[tuple[str, int]]) -> dict[int, str]:
    found = {}
    for host, port in ports:
        try:
            require_free(host, port)
        except PortInUseError as e:
            found[port] = str(e)
    return found


def _spaces() -> Iterable[tuple[str, Space]]:
    folder = state_root()
    while not folder.exists():
        folder = folder.parent
    for name, path in (("state", folder), ("shm", Path("/dev/shm"))):
        if path.is_dir():
            s = os.statvfs(path)
            yield name, Space(s.f_blocks * s.f_frsize, s.f_bavail * s.f_frsize)
