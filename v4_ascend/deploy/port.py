"""Addresses to listen at: ours once bound, or whose they are."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from v4_ascend.errors import PortInUseError

LISTEN = "0A"  # of /proc/net/tcp


def require_free(host: str, port: int) -> None:
    """Raise PortInUseError, naming the owner if it can be seen, unless we could listen."""
    bound(host, port).close()


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that has an address, and does not listen yet.

    Raises:
        PortInUseError: naming the owner if it can be seen.
    """
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind((host, port))
    except OSError as e:
        s.close()
        owner = _owner(port) or "a process that is not visible from here"
        raise PortInUseError(
            f"port {port} on {host}: {e.strerror}; held by {owner}; "
            "stop it or choose another with --port"
        ) from e
    return s


def _owner(port: int) -> str | None:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = {os.readlink(fd) for fd in (process / "fd").iterdir()}
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended, or is another user's
            continue
        if links & inodes:
            return f"pid {process.name} ({command.strip()[:80]})"
    return None
