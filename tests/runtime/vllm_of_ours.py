"""A stand-in for the command `vllm` that answers chats: the engine behind it is this project's.

It shows that what starts vLLM starts it rightly, nothing about vLLM. It refuses what vLLM 0.23.0
would refuse of its command line, and addresses and interfaces in the environment that are not this
host's. A headless one brings the first one its DP ranks; the first one serves once all are there,
and ends with exit code 1 if one leaves.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import yaml

from v4_ascend.config.model import ModelConfig
from v4_ascend.deploy.torchrun import addresses
from v4_ascend.deploy.vllm.arguments import arguments, parse

ADDRESSES = ("HCCL_IF_IP", "VLLM_HOST_IP")
DP = ("data-parallel-size", "data-parallel-size-local", "data-parallel-start-rank")
RPC_PORT, INSIDE = 29550, 18999  # vLLM's default; where the engine behind answers


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main():
    given = parse(["vllm", *sys.argv[1:]], arguments("0.23.0"))
    require_own()
    size, local, start = (int(given.get(flag) or 0) for flag in DP)
    where = (
        given.get("data-parallel-address"),
        int(given.get("data-parallel-rpc-port") or RPC_PORT),
    )
    if given.get("headless"):
        join(where, start, local)
        return
    if local and local < size:
        gather(where, set(range(start, start + local)), size)
    serve(given)


def require_own():
    """End if an address or an interface is not this host's."""
    own = dict(addresses())
    for name, value in os.environ.items():
        if name in ADDRESSES and value not in own.values():
            raise SystemExit(f"{name}: {value} is no address of this host: {own}")
        if name.endswith("_SOCKET_IFNAME") and value not in own:
            raise SystemExit(f"{name}: {value} is no interface of this host: {own}")


def join(where, start, local):
    """Bring DP ranks to the first host, and stay as long as it does."""
    deadline = time.monotonic() + 60
    while True:
        try:
            joined = socket.create_connection(where, timeout=5)
            break
        except OSError as e:
            if time.monotonic() > deadline:
                raise SystemExit(f"{where}: {e}") from e
            time.sleep(0.5)
    with joined:
        joined.settimeout(None)
        joined.sendall(" ".join(map(str, range(start, start + local))).encode() + b"\n")
        say(f"DP ranks {start} to {start + local - 1} are with {where[0]}")
        joined.recv(1)
    raise SystemExit("the first host is gone")


def gather(where, ranks, size):
    """Wait until there is each DP rank, from one host alone."""
    listener = socket.create_server(where)
    while len(ranks) < size:
        joined, _ = listener.accept()
        coming = set(map(int, joined.makefile("rb").readline().split()))
        if not coming or coming & ranks or max(coming) >= size:
            raise SystemExit(f"DP ranks {sorted(coming)} come, {sorted(ranks)} of {size} are there")
        ranks |= coming
        threading.Thread(target=watch, args=(joined,), daemon=True).start()
    say(f"all {size} DP ranks are there")


def watch(joined):
    """End this process once a host that joined is gone."""
    joined.recv(1)
    say("a host is gone")
    os.kill(os.getpid(), signal.SIGTERM)


def serve(given):
    """Serve the checkpoint by the native engine until told to stop; exit as it does."""
    checkpoint, key = sys.argv[2], os.environ.get("VLLM_API_KEY")
    longest = ModelConfig.read(Path(checkpoint)).max_seq_len
    topology = {
        "name": "behind-vllm",
        "cluster": {
            "device": "cpu",
            "supernodes": [{"name": "s", "hosts": ["localhost"], "devices_per_host": 1}],
        },
        "model": {"checkpoint": checkpoint, "name": given["served-model-name"]},
        "serve": {
            "host": "127.0.0.1",
            "port": INSIDE,
            "max_model_len": min(int(given["max-model-len"]), longest, 1200),
            "concurrency": 4,
            "api_keys": [key] if key else [],
            "require_key": False,
        },
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(topology, file)
        file.flush()
        words = ("--topology", file.name, "--skip-preflight")
        served = subprocess.Popen([sys.executable, "-m", "v4_ascend", "deploy", *words])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: served.send_signal(n))
        while served.poll() is None and not is_ready():
            time.sleep(0.2)
        threading.Thread(
            target=relay, args=((given["host"], int(given["port"])),), daemon=True
        ).start()
        raise SystemExit(served.wait())


def is_ready():
    try:
        return httpx.get(f"http://127.0.0.1:{INSIDE}/ready").status_code == 200
    except httpx.TransportError:
        return False


def relay(where):
    """Listen where vLLM would; it does so once it has loaded, our front before."""
    listener = socket.create_server(where)
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", INSIDE))
        for one, other in ((client, server), (server, client)):
            threading.Thread(target=pass_on, args=(one, other), daemon=True).start()


def pass_on(one, other):
    with suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


main()
