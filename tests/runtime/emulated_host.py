"""A machine that is none: namespaces of its own, and in them an ssh server.

Network, mounts, names and processes are its own: another /proc, another host name, a folder of
state that no other host sees. The server is OpenSSH's sshd where there is one (in PATH, /usr/sbin
or where V4_ASCEND_SSHD says), else ssh_host.py.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

SERVER = Path(__file__).with_name("ssh_host.py")
PORT = 2222
CONFIG = """\
Port {port}
ListenAddress {address}
HostKey {keys}/host
AuthorizedKeysFile {keys}/client.pub
PidFile none
StrictModes no
UsePAM no
SetEnv {env}
"""


def sshd():
    """Return the path of OpenSSH's server, None where there is none."""
    return os.environ.get("V4_ASCEND_SSHD") or shutil.which(
        "sshd", path=f"{os.environ['PATH']}:/usr/sbin"
    )


class EmulatedHost:
    """One host, from its start to `end`."""

    def __init__(self, name, address, folder, env):
        """Start it in the network namespace of its name; `folder` has ``keys``, ``state``."""
        self.name, self.env = name, env
        lines = [
            "set -e",
            f"hostname {name}",
            f"mount -t tmpfs -o mode=700 tmpfs {shlex.quote(str(folder / 'state'))}",
            *self._server(address, folder),
        ]
        enter = ["ip", "netns", "exec", name]
        apart = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._parent = subprocess.Popen([*enter, *apart, "sh", "-c", "\n".join(lines)], env=env)
        self.pid = self._first_process()

    def _server(self, address, folder):
        keys = folder / "keys"
        if (found := sshd()) is None:
            words = [sys.executable, str(SERVER), address, str(PORT), str(keys / "host"),
                     str(keys / "client.pub")]  # fmt: skip
            return [f"exec {shlex.join(words)}"]
        # It starts commands with an environment of its own.
        passed = ("PATH", "PYTHONPATH", "XDG_STATE_HOME", "OMP_NUM_THREADS")
        env = " ".join(f'{k}="{self.env[k]}"' for k in passed if k in self.env)
        config, users = folder / f"sshd-{self.name}", folder / "passwd"
        config.write_text(CONFIG.format(port=PORT, address=address, keys=keys, env=env))
        known = Path("/etc/passwd").read_text()
        users.write_text(known + "sshd:x:65532:65534::/run/sshd:/usr/sbin/nologin\n")
        return [
            "mount -t tmpfs tmpfs /run",
            "mkdir /run/sshd",
            f"mount --bind {shlex.quote(str(users))} /etc/passwd",
            f"exec {shlex.join([found, '-D', '-e', '-f', str(config)])}",
        ]

    def _first_process(self):
        """Return the number outside of the process that is 1 inside."""
        deadline = time.monotonic() + 10
        children = Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children")
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline
            assert self._parent.poll() is None, f"{self.name} did not start"
            time.sleep(0.05)
        return int(found[0])

    def command(self, *words):
        """Return the command that runs another one on the host."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--pid", "--net"]
        return [*enter, *map(str, words)]

    def outside(self, pid):
        """Return the number outside of a process by its number on the host."""
        for found in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = found.read_text().splitlines()
            except OSError:
                continue
            numbers = next((x.split()[1:] for x in lines if x.startswith("NSpid:")), [])
            if numbers[1:] == [str(pid)] and self._is_here(found.parent):
                return int(numbers[0])
        raise ProcessLookupError(pid)

    def _is_here(self, process):
        ours = os.readlink(f"/proc/{self.pid}/ns/pid")
        return os.readlink(process / "ns" / "pid") == ours

    @property
    def pids(self):
        """Those of the host itself, outside."""
        return {self._parent.pid, self.pid}

    def end(self):
        """End it with all that runs on it."""
        self._parent.kill()
        self._parent.wait(10)
