"""The command that starts the ranks of one host, and its environment."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from v4_ascend.config.private import private_folder
from v4_ascend.emulation.environment import environment
from v4_ascend.errors import DeployError
from v4_ascend.runtime.link import STORE
from v4_ascend.supernode.plan import Plan

MAX_RESTARTS = 3
FOLDER = "torchrun"  # of a deployment's folder: where ranks meet, and what they write
SIOCGIFADDR = 0x8915  # linux/sockios.h
# How each library learns which network interface to use. An emulated NPU's HCCL is gloo.
INTERFACE_KEYS = {"cpu": "GLOO_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME",
                  "ascend": "HCCL_SOCKET_IFNAME", "mindspore": "HCCL_SOCKET_IFNAME"}  # fmt: skip


def hosts_of(plan: Plan) -> tuple[str, ...]:
    """Return the plan's hosts in the order of their ranks."""
    return tuple(dict.fromkeys(r.host for r in plan.ranks))


def torchrun(
    plan: Plan, host: str, folder: Path, meeting: str | None
) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a host's ranks; their plan is in `folder`.

    `meeting` is ``address:port`` of the plan's first host, where the ranks of several hosts find
    each other.

    Raises:
        DeployError: the host's name is no address of this machine.
    """
    env = dict(os.environ) | {"V4_ASCEND_HOST": host}
    python = sys.executable
    if plan.emulated:
        python, env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = str(environment("npu")), "0"
    of_ranks = folder / FOLDER
    shutil.rmtree(of_ranks, ignore_errors=True)
    private_folder(of_ranks)
    interface_key = INTERFACE_KEYS["cpu" if plan.emulated else plan.backend]
    if meeting is None:
        env[STORE] = f"file://{of_ranks / 'store'}"
        if interface_key == INTERFACE_KEYS["cpu"]:
            env.setdefault(interface_key, "lo")
    else:
        env[STORE] = f"tcp://{meeting}"
        env.setdefault(interface_key, interface_of(address_of(host), host))
    # A torchrun of each host's own, which meets nobody: its store listens on every interface, asks
    # nobody who he is, and unpickles what is put there.
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    n_ranks = sum(r.host == host for r in plan.ranks)
    command = [
        *(python, "-m", "torch.distributed.run", "--nnodes", "1"),
        *("--nproc-per-node", str(n_ranks), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", str(of_ranks / "rendezvous"), "--rdzv-conf", "store_type=file"),
        *("--max-restarts", str(MAX_RESTARTS)),
        # Slower than the front's watch: it must see which rank ended before all others are.
        *("--monitor-interval", "1"),
        # Each line says which of the host's ranks wrote it: `logs --rank`.
        *("--tee", "3", "--log-dir", str(of_ranks)),
        *("-m", "v4_ascend.runtime.worker", str(folder)),
    ]
    return command, env | {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${local_rank}]: "}


def require_first_here(hosts: Sequence[str]) -> None:
    """Refuse several hosts whose first one is another machine than this.

    Raises:
        DeployError: naming it, or that its name does not resolve.
    """
    if len(hosts) > 1:
        interface_of(address_of(hosts[0]), hosts[0])


def address_of(host: str) -> str:
    """Return a host's address for the others; V4_ASCEND_ADDRESS wins over its name, here.

    Raises:
        DeployError: the name does not resolve.
    """
    try:
        return os.environ.get("V4_ASCEND_ADDRESS") or socket.gethostbyname(host)
    except OSError as e:
        raise DeployError(f"{host}: its name does not resolve here ({e.strerror})") from e


def interface_of(address: str, host: str) -> str:
    """Return the network interface that has an IPv4 address."""
    for name, found in addresses():
        if found == address:
            return name
    raise DeployError(
        f"{host} ({address}) is no address of this machine ({socket.gethostname()}); deploy runs "
        "on the first host of the topology, and each host's name must be its address for the others"
    )


def addresses() -> Iterator[tuple[str, str | None]]:
    """Yield the network interfaces, each with its IPv4 address if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(s, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                yield name, None
            else:
                yield name, socket.inet_ntoa(found[20:24])
