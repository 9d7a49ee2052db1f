"""A host whose key is not known, or is another than before, gets nothing of ours."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from v4_ascend.deploy.ssh import SSH

REACHED = 7
SERVER = Path(__file__).parents[1] / "runtime" / "ssh_host.py"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "client", "other"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    return folder


def answers(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def port(keys, free):
    command = [sys.executable, str(SERVER), "127.0.0.1", str(free), str(keys / "host")]
    server = subprocess.Popen([*command, str(keys / "client.pub")])
    deadline = time.monotonic() + 20
    while not answers(free) and time.monotonic() < deadline:
        time.sleep(0.1)
    yield free
    server.terminate()
    server.wait(10)


@pytest.fixture(scope="module")
def free():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ssh(keys, port, known, tmp_path):
    """Run a command as `deploy` runs its agent, with a configuration that trusts nobody."""
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {known}" if known else "")
    (tmp_path / "config").write_text(
        f"Port {port}\nIdentityFile {keys / 'client'}\nIdentitiesOnly yes\n"
        f"UserKnownHostsFile {tmp_path / 'known'}\nGlobalKnownHostsFile /dev/null\n"
    )
    command = [SSH[0], "-F", str(tmp_path / "config"), *SSH[1:], "127.0.0.1", f"exit {REACHED}"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL
    )


def test_a_known_host_is_reached(keys, port, tmp_path):
    done = ssh(keys, port, (keys / "host.pub").read_text(), tmp_path)
    assert done.returncode == REACHED, done.stderr


@pytest.mark.parametrize("known", ["nobody", "another key"])
def test_an_unknown_host_or_a_changed_key_is_refused(keys, port, tmp_path, known):
    text = (keys / "other.pub").read_text() if known == "another key" else ""
    done = ssh(keys, port, text, tmp_path)
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr
    assert (tmp_path / "known").read_text().count("\n") == text.count("\n"), "it was not learned"
