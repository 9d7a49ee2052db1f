"""A deployment on two hosts is changed while it answers: ``python two_hosts_upgraded.py``.

The hosts are those of test_two_hosts.py. Each step prints what it saw; the first that is not as it
should be ends the drill with an error. It takes some minutes.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import httpx
from container_hosts import pids
from test_deploy import ASK, wait_for
from test_two_hosts import Hosts, cabled
from test_upgrades import stream

N_STREAMS = 6
OTHER = "v4a-two"


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def deploy(hosts, *settings, options=()):
    """Change it, by `--set` of each setting; return how that ended."""
    words = [word for s in settings for word in ("--set", s)]
    command = ("deploy", "--topology", hosts.topology, "--drain-timeout", 200, "--timeout", 200)
    return hosts.run(*command, *words, *options, "--detach", timeout=500)


def answer(hosts):
    return httpx.post(f"{hosts.url}/v1/chat/completions", json=ASK | {"max_tokens": 12}, timeout=90)


def served_and_replaced(hosts, setting, *options):
    """Change a setting while streams run; return what was said, and how the streams ended."""
    (before,) = hosts.status()
    old = set(hosts.left())
    with ThreadPoolExecutor(N_STREAMS + 1) as pool:
        changing = pool.submit(deploy, hosts, setting, options=options)
        streams = []
        while not changing.done():
            if sum(not s.done() for s in streams) < N_STREAMS:
                streams.append(pool.submit(stream, hosts, len(streams), 40))
            time.sleep(0.2)
        done = changing.result()
        ends = [s.exception() or s.result() for s in streams]
    assert done.returncode == 0, done.stderr
    wait_for(lambda: len(hosts.status()) == 1, seconds=90)
    (after,) = hosts.status("two")
    assert after["pid"] != before["pid"]
    assert after["state"] == "ready"
    assert wait_for(lambda: not old & set(hosts.left()), seconds=60), "the old one's processes stay"
    assert answer(hosts).status_code == 200
    return done.stderr, ends


def drill(hosts):
    """Run every step."""
    done = deploy(hosts)
    assert done.returncode == 0, done.stderr
    want = answer(hosts).json()["choices"]

    said, ends = served_and_replaced(hosts, "serve.max_model_len=1000")
    assert "a shadow starts beside" in said, said
    assert set(ends) == {"length"}, ends
    assert answer(hosts).json()["choices"] == want
    say(f"a shadow took the address: {len(ends)} streams, none refused or cut; the old one ended")

    # A shadow's ranks on the other host are killed while it loads: the old one serves on.
    (before,) = hosts.status()
    old, of_old = set(hosts.left()), agents()
    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(deploy, hosts, "serve.max_model_len=900")
        (agent,) = wait_for(lambda: agents() - of_old, seconds=60)
        os.kill(agent, signal.SIGKILL)
        done = changing.result()
    assert done.returncode == 6, (done.returncode, done.stderr)
    assert wait_for(lambda: set(hosts.left()) <= old, seconds=60), "the shadow's processes stay"
    (after,) = hosts.status()
    assert (after["pid"], after["state"]) == (before["pid"], "ready")
    assert answer(hosts).json()["choices"] == want
    say(f"a shadow lost a host: {done.stderr.strip().splitlines()[-1]}; the old one serves on")

    said, ends = served_and_replaced(hosts, "serve.max_model_len=800", "--replace", "downtime")
    assert "was down for" in said, said
    say(next(x for x in said.splitlines() if "was down for" in x))

    assert hosts.run("down", "two").returncode == 0
    assert wait_for(lambda: not hosts.left() and not agents(), seconds=40), "down leaves something"
    say("down left nothing on either host")


def agents():
    """Those that hold the second host's ranks."""
    found = set()
    for pid in pids(OTHER):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"v4_ascend.deploy.agent" in words:  # not the shell that starts it
            found.add(pid)
    return found


def main():
    """Lay cables, deploy, change, and take all away again."""
    if os.geteuid() or not shutil.which("ip"):
        raise SystemExit("network namespaces need root and iproute2")
    folder = Path(tempfile.mkdtemp(prefix="v4-two-hosts-"))
    with cabled():
        hosts = Hosts(folder)
        text = hosts.topology.read_text().replace("devices_per_host: 2", "devices_per_host: 1")
        hosts.topology.write_text(text.replace("dp_size: 2, ep_size: 2", "dp_size: 1"))
        try:
            checkpoint = hosts.folder / "tiny"
            done = hosts.run("init", "--preset", "tiny", "--format", "fp32", "--out", checkpoint)
            assert done.returncode == 0, done.stderr
            drill(hosts)
        finally:
            hosts.end()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
