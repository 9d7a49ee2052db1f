"""Start what deploy writes for each launcher on two hosts, until a chat is answered.

python tests/runtime/all_launchers.py [WORD...]     # those with all words in their name

The hosts are those of container_hosts.py; vLLM is played by vllm_of_ours.py. An AscendJob is of
NPUs, and there are none: of the native engine it is written past the refusal, for a CPU's plan.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import container_hosts
import httpx
import yaml
from container_hosts import FRONT, HOSTS, IMAGE, from_compose, from_pod, pids
from test_deploy import ASK, wait_for

from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.cli import deploy_containers
from v4_ascend.config.topology import load_topology
from v4_ascend.deploy.containers import kubernetes
from v4_ascend.supernode.planning import bundled_model

PATH = IMAGE["PATH"]
PORT, KEY = 18000, "key-of-the-drill"
DEVICES = {  # device, devices of a host, layout of two hosts
    "cpu": ("cpu", 1, {"pp_size": 2}),
    "a2": ("ascend-a2-64", 8, {"dp_size": 4, "tp_size": 4, "ep_size": 16}),
    "a3": ("ascend-a3-64", 16, {"dp_size": 8, "tp_size": 4, "ep_size": 32}),
    "950": ("ascend-950dt-96", 8, {"dp_size": 16, "ep_size": 16}),
    "hopper": ("nvidia-h200", 8, {"dp_size": 16, "ep_size": 16}),
}
# Of each controller: the first pod's name or address, and what it sets in pods.
WORKLOADS = {
    "leader-worker-set": ("it-0.it.default", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"),
    "volcano-job": ("it-first-0.it", "VC_TASK_INDEX", None),
    "ascend-job": (HOSTS["v4c-one"], "RANK", "MASTER_ADDR"),
}


@dataclass(frozen=True)
class Case:
    """One output of deploy."""

    engine: str
    launcher: str
    family: str
    n_hosts: int = 2

    @property
    def name(self):
        return f"{self.engine} {self.launcher} {self.family}"


CASES = [
    *(Case("native", x, "cpu") for x in ("docker", *WORKLOADS)),
    *(Case("vllm", x, f) for f in ("a3", "950", "a2", "hopper") for x in ("docker", *WORKLOADS)
      if x != "ascend-job"),
    Case("vllm", "ascend-job", "a3", n_hosts=1),
]  # fmt: skip


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def files(case, folder):
    """Write what deploy writes for a case; return the file names' texts, and the private ones."""
    device, n, layout = DEVICES[case.family]
    model = "tiny" if case.engine == "native" else "flash"
    hosts = {"name": "s", "hosts": ["host-a", "host-b"][: case.n_hosts], "devices_per_host": n}
    if case.n_hosts == 1:
        layout = "auto"
    is_docker = case.launcher == "docker"
    topology = {
        "name": "it",
        "cluster": {"device": device, "supernodes": [hosts]},
        "model": {"checkpoint": str(folder / model), "name": f"v4-{model}"},
        "serve": {"max_model_len": 1200, "concurrency": 16, "host": "0.0.0.0", "port": PORT}
        | {"api_keys": [KEY]},
        "layout": layout,
        "engine": case.engine,
        "launcher": "docker" if is_docker else "kubernetes",
        "kubernetes": {} if is_docker else {"workload": case.launcher},
        "container": {} if is_docker else {"image": "registry/v4:1"},
    }
    file = folder / "it.yaml"
    file.write_text(yaml.safe_dump(topology))
    if case.engine == "native" and case.launcher == "ascend-job":
        kubernetes._require_possible = lambda target: None
    written = deploy_containers.written(load_topology(str(file)))
    written.write(folder / "out")
    return written


def start(case, folder, models):
    """Start a container for each host; return them, the first one first."""
    bin_ = folder / "bin"
    bin_.mkdir()
    vllm = bin_ / "vllm"
    source = Path(__file__).with_name("vllm_of_ours.py")
    vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {source} "$@"\n')
    vllm.chmod(0o755)
    IMAGE["PATH"] = f"{bin_}:{PATH}"
    written = files(case, folder)  # planned where no checkpoint is: by the model's name
    shutil.copytree(models, folder / ("tiny" if case.engine == "native" else "flash"))
    names = folder / "hosts"
    lines = [f"{address} host-{x}\n" for x, address in zip("ab", HOSTS.values(), strict=True)]
    one = HOSTS["v4c-one"]
    lines += [f"{one} {name}\n" for name, *_ in WORKLOADS.values() if name != one]
    names.write_text("".join(["127.0.0.1 localhost\n", *lines]))
    hosts = list(HOSTS)[: case.n_hosts]
    if case.launcher == "docker":
        return [
            from_compose(folder / "out" / f"host-{x}" / "compose.yaml", host, names,
                         folder / f"{x}.log",
                         {"V4_ASCEND_ADDRESS": HOSTS[host], "V4_ASCEND_NIC": "v4c0"})
            for x, host in zip("ab", hosts, strict=False)
        ]  # fmt: skip
    found = {d["kind"]: d for d in yaml.safe_load_all(written.files["manifests.yaml"])}
    maps = {}
    if "ConfigMap" in found:
        maps[found["ConfigMap"]["metadata"]["name"]] = found["ConfigMap"]["data"]
    secrets = {"it-secret": {"secret": "0123456789abcdef" * 4} | written.private}
    first, index, address = WORKLOADS[case.launcher]
    started = []
    for i, (host, template) in enumerate(zip(hosts, templates(found), strict=True)):
        pod = folder / f"pod-{i}"
        pod.mkdir()
        number = 0 if case.launcher == "volcano-job" else i  # each task counts its own pods
        given = {index: str(number)} | ({address: first} if address else {})
        started.append(from_pod(template, maps, secrets, given, host, names, pod))
    return started


def templates(manifests):
    """Pod templates of a workload, the first pod's first."""
    if "LeaderWorkerSet" in manifests:
        group = manifests["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    if "Job" in manifests:
        return [t["template"] for t in manifests["Job"]["spec"]["tasks"]]
    roles = manifests["AscendJob"]["spec"]["replicaSpecs"]
    return [roles[role]["template"] for role in ("Master", "Worker") if role in roles]


def answered(case, models, seconds=200):
    """Start a case, ask, stop it; return the seconds until it was healthy, and the answer."""
    folder, containers = Path(tempfile.mkdtemp(prefix="v4-launcher-")), []
    try:
        began = time.monotonic()
        containers = start(case, folder, models)

        def healthy():
            for c in containers:
                assert c.process.poll() is None, c.said()
            return containers[0].is_healthy()

        wait_for(healthy, seconds=seconds)
        if (case.engine, case.launcher) == ("native", "ascend-job"):  # has no readiness probe
            wait_for(lambda: httpx.get(f"http://{FRONT}:{PORT}/ready").status_code == 200, seconds)
        took = time.monotonic() - began
        url = f"http://{FRONT}:{PORT}/v1/chat/completions"
        model = "v4-tiny" if case.engine == "native" else "v4-flash"
        body = ASK | {"model": model, "max_tokens": 12}
        assert httpx.post(url, json=body, timeout=90).status_code == 401
        answer = httpx.post(url, json=body, headers={"x-api-key": KEY}, timeout=90)
        assert answer.status_code == 200, answer.text
        # As vLLM's headless processes, those here end when told to or when the first one is gone.
        for c in reversed(containers):
            c.process.send_signal(signal.SIGTERM)
        for c in containers:
            c.process.wait(60)
        assert wait_for(lambda: not [p for h in HOSTS for p in pids(h)], seconds=10)
        return took, answer.json()["choices"][0]
    except BaseException:
        for c in containers:
            say(f"--- {c.log}\n{c.said()}")
        raise
    finally:
        IMAGE["PATH"] = PATH
        for c in containers:
            if c.process.poll() is None:
                c.kill()
        shutil.rmtree(folder)


def main():
    """Run all cases, or those asked for."""
    if os.geteuid() or not shutil.which("ip"):
        raise SystemExit("network namespaces need root and iproute2")
    models = Path(tempfile.mkdtemp(prefix="v4-model-")) / "tiny"
    write_synthetic(in_format(bundled_model("tiny", "the drill"), "fp32"), models, seed=0)
    container_hosts.lay_cables()
    try:
        chosen = [c for c in CASES if all(word in c.name.split() for word in sys.argv[1:])]
        for case in chosen:
            took, answer = answered(case, models)
            said = answer["message"]["content"]
            say(f"{case.name}: healthy after {took:.0f} s, answered {len(said)} characters; ended")
        say(f"{len(chosen)} outputs of deploy were started and answered")
    finally:
        container_hosts.remove()
        shutil.rmtree(models.parent)


if __name__ == "__main__":
    main()
