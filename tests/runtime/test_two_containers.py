"""What deploy writes for docker and Kubernetes, started on two hosts until a chat answers."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import all_launchers
import container_hosts
import httpx
import pytest
import yaml
from container_hosts import FRONT, HOSTS, from_compose, from_pod, pids
from test_deploy import ASK, wait_for

PORT = 18000
ONE, TWO = HOSTS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny checkpoint; hosts that reach each other."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    folder = tmp_path_factory.mktemp("containers") / "tiny"
    run("init", "--preset", "tiny", "--format", "fp32", "--out", folder)
    container_hosts.lay_cables()
    yield folder
    container_hosts.remove()


@pytest.fixture(autouse=True)
def started():
    """Containers that a test starts, and that end with it."""
    containers = []
    yield containers
    for c in containers:
        if c.process.poll() is None:
            c.kill()


def run(*args):
    command = [sys.executable, "-m", "v4_ascend", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def topology(folder, tiny, **changes):
    hosts = {"name": "s", "hosts": ["host-a", "host-b"], "devices_per_host": 1}
    wanted = {
        "name": "two",
        "cluster": {"device": "cpu", "supernodes": [hosts]},
        "model": {"checkpoint": str(tiny), "name": "v4-tiny"},
        "serve": {"max_model_len": 1200, "concurrency": 4, "host": FRONT, "port": PORT}
        | {"require_key": False},
        "layout": {"pp_size": 2},
    }
    for key, value in changes.items():
        wanted[key] = wanted.get(key, {}) | value if isinstance(value, dict) else value
    file = folder / "t.yaml"
    file.write_text(yaml.safe_dump(wanted))
    return file


def ready(*containers):
    """Wait until ready; None while it is not. What has ended by itself will never be."""
    for c in containers:
        assert c.process.poll() is None, c.said()
    try:
        return httpx.get(f"http://{FRONT}:{PORT}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ask(**changes):
    body = ASK | {"max_tokens": 12, **changes}
    answer = httpx.post(f"http://{FRONT}:{PORT}/v1/chat/completions", json=body, timeout=90)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.slow
def test_compose_files_start_answer_name_a_lost_host_and_stop(tiny, tmp_path, started):
    file, out = topology(tmp_path, tiny, launcher="docker"), tmp_path / "out"
    run("deploy", "--topology", file, "--dry-run", "--out", out)
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n")

    def start(name, host, attempt):
        log = tmp_path / f"{name}-{attempt}.log"
        started.append(from_compose(out / name / "compose.yaml", host, names, log))
        return started[-1]

    # The other host is up first, and nobody knows the first one's name yet.
    b = start("host-b", TWO, 1)
    wait_for(lambda: "waiting for the name host-a" in b.said(), seconds=30)
    with names.open("a") as f:
        f.writelines(
            f"{address} host-{x}\n" for x, address in zip("ab", HOSTS.values(), strict=True)
        )
    a = start("host-a", ONE, 1)
    wait_for(lambda: ready(a, b), seconds=200)
    want = ask()
    assert want["finish_reason"] in ("stop", "length")

    b.kill()
    assert wait_for(lambda: a.process.poll() is not None, seconds=60)
    assert a.process.returncode == 6, a.said()
    assert "error: two: host-b (" in a.said()
    assert " is lost: no word for 15 s" in a.said()
    assert "flight: " in a.said()
    assert wait_for(lambda: not pids(ONE) + pids(TWO), seconds=10)

    # Whoever started them starts them again; then all are told to stop at once.
    a, b = start("host-a", ONE, 2), start("host-b", TWO, 2)
    wait_for(lambda: ready(a, b), seconds=200)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, max_tokens=100, ignore_eos=True)
        wait_for(lambda: running() > 0, seconds=20)
        for c in (b, a):
            c.process.send_signal(signal.SIGTERM)
        assert long.result(60)["finish_reason"] == "length"
    for c in (a, b):
        assert c.process.wait(30) == 0, c.said()
    assert wait_for(lambda: not pids(ONE) + pids(TWO), seconds=10)


def running():
    lines = httpx.get(f"http://{FRONT}:{PORT}/metrics").text.splitlines()
    (line,) = [x for x in lines if x.startswith("vllm:num_requests_running{")]
    return float(line.split()[-1])


@pytest.mark.slow
def test_pods_of_a_leader_worker_set_start_and_answer(tiny, tmp_path, started):
    changes = {
        "container": {"image": "registry/v4:1"},
        "serve": {"host": "0.0.0.0", "require_key": False},
    }
    file = topology(tmp_path, tiny, launcher="kubernetes", **changes)
    documents = yaml.safe_load_all(run("deploy", "--topology", file, "--dry-run"))
    found = {d["kind"]: d for d in documents}
    group = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    config_maps = {found["ConfigMap"]["metadata"]["name"]: found["ConfigMap"]["data"]}
    secrets = {"two-secret": {"secret": "0123456789abcdef" * 4}}
    names = tmp_path / "hosts"
    names.write_text(f"127.0.0.1 localhost\n{HOSTS[ONE]} two-0.two.default\n")
    pods = started
    for i, (host, template) in enumerate(
        zip(HOSTS, (group["leaderTemplate"], group["workerTemplate"]), strict=True)
    ):
        given = {"LWS_LEADER_ADDRESS": "two-0.two.default", "LWS_WORKER_INDEX": str(i)}
        folder = tmp_path / f"pod-{i}"
        folder.mkdir()
        pods.append(from_pod(template, config_maps, secrets, given, host, names, folder))
    wait_for(lambda: ready(*pods), seconds=200)
    assert ask()["message"]["content"] is not None
    # A pod is deleted: the first one lets requests end and fails, so that the group is made anew.
    pods[1].process.send_signal(signal.SIGTERM)
    assert pods[1].process.wait(60) == 0, pods[1].said()
    assert pods[0].process.wait(60) == 6, pods[0].said()
    assert ") is being stopped" in pods[0].said()
    assert wait_for(lambda: not pids(ONE) + pids(TWO), seconds=10)


@pytest.mark.slow
def test_pods_of_vllm_find_their_ranks_and_addresses_and_answer(tiny):
    """One of the drill's; ``python tests/runtime/all_launchers.py`` starts all."""
    case = all_launchers.Case("vllm", "volcano-job", "a3")
    assert case in all_launchers.CASES
    _, answer = all_launchers.answered(case, tiny)
    assert answer["finish_reason"] in ("stop", "length")
