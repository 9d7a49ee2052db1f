"""What a deployment shows to its network and to other users of the host."""

import asyncio
import json
import os
import socket
import stat
import struct
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from test_deploy import Box

from v4_ascend.config.topology import is_loopback
from v4_ascend.errors import RequestError
from v4_ascend.runtime.api import gate, punctual

KEY = "of-the-tests"
FREE = {"/", "/health", "/ready", "/metrics", "/ranks", "/experts", "/openapi.json"}
LISTEN = "0A"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two ranks behind a front; an umask that would let everybody read."""
    box = Box(tmp_path_factory.mktemp("exposed"))
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    devices = "cluster.supernodes=[{name: here, hosts: [localhost], devices_per_host: 2}]"
    settings = ("layout={dp_size: 2, ep_size: 2}", devices, f"serve.api_keys=[{KEY}]", "name=open")
    options = [word for s in settings for word in ("--set", s)]
    before = os.umask(0)
    try:
        done = box.run("deploy", "--topology", box.topology, *options, "--detach")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    yield box
    assert box.run("down", "open").returncode == 0


def listening(pids):
    """Return the addresses that processes listen at, from the kernel's own tables."""
    found = set()
    for pid in pids:
        inodes = set()
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed in between
                inodes.add(os.readlink(fd))
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and f"socket:[{fields[9]}]" in inodes:
                    words = bytes.fromhex(fields[1].partition(":")[0])
                    n = len(words) // 4  # in the byte order of the host, word by word
                    packed = struct.pack(f">{n}I", *struct.unpack(f"={n}I", words))
                    found.add(socket.inet_ntop(family, packed).removeprefix("::ffff:"))
    return found


def test_nothing_of_a_deployment_on_one_host_listens_beyond_loopback(served):
    """torchrun's rendezvous did: it unpickles what anybody puts there."""
    pids = served.processes()
    assert len(pids) >= 5  # supervisor, front, torchrun, two ranks
    found = listening(pids)
    assert found
    assert all(map(is_loopback, found)), found


def test_every_file_of_the_state_is_the_users_alone(served):
    state = served.folder / "state/v4-ascend/open"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    names = {p.name for p in state.iterdir()}
    assert names >= {
        "plan.json",
        "link.json",
        "supervisor.json",
        "lock",
        "control",
        "front.log",
        "ranks.log",
    }
    for path in state.iterdir():
        assert not path.stat().st_mode & 0o077, path
    assert KEY in (state / "plan.json").read_text()


def test_the_front_s_own_port_wants_the_key_too(served):
    file = served.folder / "state/v4-ascend/open/supervisor.json"
    inside = json.loads(file.read_text())["inside"]
    assert inside.startswith("http://127.0.0.1:")
    assert httpx.get(f"{inside}/v1/models").status_code == 401


def test_prompts_answers_and_keys_are_in_no_log(served):
    prompt = "the-secret-of-the-prompt"
    body = {"model": "v4-tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 4}
    body |= {"user": "the-user", "stop": ["the-stop"]}
    answer = httpx.post(
        f"{served.url}/v1/chat/completions", json=body, timeout=60, headers={"X-Api-Key": KEY}
    )
    assert answer.status_code == 200
    wrong = httpx.post(
        f"{served.url}/v1/chat/completions", json=body, headers={"X-Api-Key": "wrong-key"}
    )
    assert wrong.status_code == 401
    logs = [p for p in (served.folder / "state").rglob("*") if p.is_file() and "log" in p.name]
    assert len(logs) >= 5
    said = "".join(p.read_text(errors="replace") for p in logs)
    assert '"path": "/v1/chat/completions"' in said
    for secret in (prompt, KEY, "wrong-key", "the-user", "the-stop"):
        assert secret not in said


def test_every_other_route_wants_the_key(served):
    routes = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    asked = {(path, method) for path, of in routes.items() for method in of}
    assert len(asked) >= 12
    for path, method in asked:
        wrong = {"Authorization": f"Bearer {KEY}x"}
        for headers in ({}, wrong, {"X-Api-Key": ""}):
            status = httpx.request(method, f"{served.url}{path}", headers=headers).status_code
            assert status == 200 if path in FREE else status == 401, (path, method, status)


@pytest.mark.parametrize(
    "path",
    ["/docs", "/redoc", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/../plan.json",
     "//etc/passwd"],
)  # fmt: skip
def test_there_are_no_files_and_no_foreign_scripts_behind_a_path(served, path):
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as s:
        s.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = s.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"root:" not in answer


def test_a_header_larger_than_allowed_is_refused(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2 * punctual.MAX_HEADER_BYTES)
        assert s.recv(100).startswith(b"HTTP/1.1 400 ")


def test_connections_that_do_not_come_to_the_point_are_closed(served):
    """One that says nothing, one that says a byte a second, one that begins a second request."""
    addresses = [("127.0.0.1", served.port)] * 3
    silent, slow, second = (socket.create_connection(a, timeout=20) for a in addresses)
    began = time.monotonic()
    second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b'"ok"}'):
        answer += second.recv(1000)
    second.sendall(b"GET /health HTTP/1.1\r\n")
    try:
        while time.monotonic() - began < punctual.HEADER_SECONDS - 2:
            slow.sendall(b"G")
            time.sleep(1)
        for connection in (silent, slow, second):
            assert connection.recv(1000) == b""
        assert time.monotonic() - began < punctual.HEADER_SECONDS + 5
    finally:
        for connection in (silent, slow, second):
            connection.close()


class Slow:
    """A request whose body comes in drops."""

    headers = {}
    client = None

    async def stream(self):
        while True:
            yield b"{"
            await asyncio.sleep(0.01)


def test_a_body_in_drops_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    plan = SimpleNamespace(api_keys=(), max_body_bytes=1 << 20, requests_per_minute=None)
    with pytest.raises(RequestError, match="not here within 0.2 s") as error:
        asyncio.run(gate.Gate(plan).read(Slow()))
    assert error.value.status == 408
