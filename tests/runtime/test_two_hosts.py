"""Two hosts: namespaces with a cable between them, each with an ssh server."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from emulated_host import EmulatedHost
from test_deploy import ASK, Box, wait_for
from test_exposure import listening

HOSTS = {"v4a-one": "10.77.0.1", "v4a-two": "10.77.0.2"}
FRONT = "10.78.0.2"  # of the first host, towards the test


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@contextmanager
def cabled():
    """Lay a cable of 200 Mbit/s between the hosts, and one to the test."""
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        ip("netns", "add", name)
    try:
        ip("link", "add", "v4a0", "netns", "v4a-one", "type", "veth", "peer", "v4a0",
           "netns", "v4a-two")  # fmt: skip
        ip("link", "add", "v4a-test", "type", "veth", "peer", "front0", "netns", "v4a-one")
        ip("addr", "add", "10.78.0.1/24", "dev", "v4a-test")
        ip("link", "set", "v4a-test", "up")
        ip("-n", "v4a-one", "addr", "add", f"{FRONT}/24", "dev", "front0")
        ip("-n", "v4a-one", "link", "set", "front0", "up")
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "v4a0")
            for device in ("lo", "v4a0"):
                ip("-n", name, "link", "set", device, "up")
            ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "v4a0", "root", "tbf",
               "rate", "200mbit", "burst", "256kb", "latency", "50ms")  # fmt: skip
        yield
    finally:
        for name in HOSTS:
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def cable():
    """Two hosts with a cable."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    with cabled():
        yield


class Hosts(Box):
    """Commands run on the first host; ssh knows the second."""

    def __init__(self, folder):
        super().__init__(folder)
        keys = folder / "keys"
        keys.mkdir()
        for name in ("host", "client"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True
            )
        host_key = (keys / "host.pub").read_text()
        (keys / "known").write_text("".join(f"[{a}]:2222 {host_key}" for a in HOSTS.values()))
        (keys / "config").write_text(
            f"Port 2222\nIdentityFile {keys / 'client'}\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {keys / 'known'}\nStrictHostKeyChecking yes\n"
        )
        shim = folder / "bin" / "ssh"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {keys / "config"} "$@"\n')
        shim.chmod(0o755)
        self.env |= {
            "PATH": f"{shim.parent}:{os.environ['PATH']}",
            "V4_ASCEND_COMM_TIMEOUT": "24",
        }
        self.topology.write_text(
            f"name: two\n"
            f"cluster:\n  device: cpu\n  supernodes:\n"
            f"    - {{name: here, hosts: [{', '.join(HOSTS.values())}], devices_per_host: 2}}\n"
            f"model: {{checkpoint: {folder / 'tiny'}, name: v4-tiny}}\n"
            f"serve: {{max_model_len: 1200, concurrency: 4, host: {FRONT}, port: {self.port}, "
            f"require_key: false}}\n"
            f"layout: {{pp_size: 2, dp_size: 2, ep_size: 2}}\n"
            f"launcher: ssh\n"
        )
        (folder / "state").mkdir()
        self.hosts = {n: EmulatedHost(n, a, folder, self.env) for n, a in HOSTS.items()}

    @property
    def url(self):
        return f"http://{FRONT}:{self.port}"

    def run(self, *args, timeout=120):
        return subprocess.run(
            self.hosts["v4a-one"].command(sys.executable, "-m", "v4_ascend", *args),
            capture_output=True,
            text=True,
            env=self.env,
            timeout=timeout,
            check=False,
        )

    def left(self):
        """Processes of ours on both hosts, the ssh servers aside."""
        return sorted(set(self.processes()) - {p for h in self.hosts.values() for p in h.pids})

    def read(self, file):
        """Read a file of the first host's state."""
        words = self.hosts["v4a-one"].command("cat", self.folder / "state/v4-ascend" / file)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def end(self):
        """Stop what is deployed, then the hosts."""
        self.run("down", "two")
        for host in self.hosts.values():
            host.end()


@pytest.fixture(scope="module")
def hosts(cable, tmp_path_factory):
    hosts = Hosts(tmp_path_factory.mktemp("two-hosts"))
    try:
        done = hosts.run("init", "--preset", "tiny", "--format", "fp32", "--out",
                         hosts.folder / "tiny")  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield hosts
    finally:
        hosts.end()


def ready(hosts):
    return httpx.get(f"{hosts.url}/ready", timeout=10)


def ask(hosts, **changes):
    body = ASK | {"max_tokens": 12, **changes}
    return httpx.post(f"{hosts.url}/v1/chat/completions", json=body, timeout=90)


@pytest.mark.slow
def test_two_hosts_answer_and_a_pulled_cable_is_named(hosts):
    one = ("--set", "layout={}", "--set", "cluster.supernodes=[{name: here, hosts: [localhost]}]",
           "--set", "launcher=local")  # fmt: skip
    alone = hosts.run("deploy", "--topology", hosts.topology, *one, "--detach")
    assert alone.returncode == 0, alone.stderr
    want = ask(hosts).json()["choices"]
    assert hosts.run("down", "two").returncode == 0

    both = hosts.run("deploy", "--topology", hosts.topology, "--detach")
    assert both.returncode == 0, both.stderr
    assert ask(hosts).json()["choices"] == want
    (row,) = hosts.status("two")
    assert [r["what"].split(", ")[-1] for r in row["ranks"]] == [
        f"{address} device {n}" + ")" for address in HOSTS.values() for n in (0, 1)
    ]
    logs = hosts.run("logs", "two").stdout
    assert f"ranks-{HOSTS['v4a-two']}" in logs or "rank 3: " in logs

    found = listening(hosts.left())
    assert HOSTS["v4a-one"] in found, "where ranks meet"
    assert found <= {*HOSTS.values(), FRONT, "127.0.0.1"}, found

    for lost, name in ((3, "v4a-two"), (0, "v4a-one")):  # the latter is where ranks meet
        (row,) = hosts.status("two")
        os.kill(hosts.hosts[name].outside(row["ranks"][lost]["pid"]), signal.SIGKILL)
        wait_for(lambda: ready(hosts).status_code == 503)
        wait_for(lambda: ready(hosts).status_code == 200, seconds=60)
        assert ask(hosts).json()["choices"] == want

    body = ASK | {"max_tokens": 1000, "stream": True}
    began = None
    with httpx.stream("POST", f"{hosts.url}/v1/chat/completions", json=body, timeout=60) as answer:
        for number, line in enumerate(answer.iter_lines()):
            if number == 4:
                ip("-n", "v4a-two", "link", "set", "v4a0", "down")
                began = time.monotonic()
            if "error" in line:
                break
    assert "rank 2 (stage 1" in line or "rank 3 (stage 1" in line, line
    assert HOSTS["v4a-two"] in line
    assert time.monotonic() - began < 20
    ended = wait_for(lambda: not hosts.status("two"), seconds=40)
    assert ended
    log = hosts.read("two/supervisor.log")
    assert f"ranks-{HOSTS['v4a-two']} ended with exit code 255" in log
    wait_for(lambda: not hosts.left(), seconds=40)
    ip("-n", "v4a-two", "link", "set", "v4a0", "up")
