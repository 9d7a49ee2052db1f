"""Manifests of a deployment: the pods as LeaderWorkerSet, Volcano job or AscendJob, and the rest.

Sources: kubernetes-sigs/lws api/leaderworkerset/v1 (labels, variables), volcano-sh/apis
batch/v1alpha1 (job, labels) and the svc plugin's flag, Ascend/mind-cluster ascend-operator
(names it wants, variables it sets).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from v4_ascend import __version__
from v4_ascend.config.topology import Topology
from v4_ascend.deploy.containers import start
from v4_ascend.deploy.containers.platforms import platforms
from v4_ascend.deploy.containers.pods import KEY, Pods, api_labels
from v4_ascend.deploy.containers.target import Target
from v4_ascend.deploy.containers.written import Written, as_yaml
from v4_ascend.deploy.vllm.key import only_key
from v4_ascend.errors import ConfigError

MAX_CONFIGMAP_BYTES = 2**20  # kubernetes.io, ConfigMaps: "cannot exceed 1 MiB"
MAX_NAME = 40  # what controllers add must still fit into the 63 characters of a label
RACK_DEVICES = 64  # of an Atlas 950 SuperPoD
RETRIES = 10


def manifests(target: Target) -> Written:
    """Return the manifests, and how they are applied.

    Raises:
        ConfigError: what no cluster would take, or what would not answer in one.
    """
    t = target.topology
    _require_possible(target)
    workload = {
        "leader-worker-set": _leader_worker_set,
        "volcano-job": _volcano_job,
        "ascend-job": _ascend_job,
    }[t.kubernetes.workload]
    documents = [workload(_Job(target)), _service(t)]
    if target.plan is None:
        text = start.script(target)
        documents.insert(0, _config_map(t, "start", {start.SCRIPT: text}))
    elif not t.serve.api_keys:  # with keys in it, the plan is a secret too
        documents.insert(0, _config_map(t, "plan", {"plan.json": target.plan_text}))
    head = (
        f"# {t.name}: {len(target.hosts)} pods on {target.platform.family}, by v4-ascend "
        f"{__version__}\n# Mounts and names: configs/containers.yaml, {platforms().dated}.\n"
    )
    texts = {"manifests.yaml": head + as_yaml(*documents)}
    private = {}
    if target.plan is None:
        if key := only_key(t):
            private[KEY] = key
    elif t.serve.api_keys:
        private["plan.json"] = target.plan_text
    return Written(texts, private, tuple(_steps(target)), has_secret=False)


def _steps(target: Target) -> list[str]:
    t = target.topology
    kubectl = f"kubectl --namespace {t.kubernetes.namespace}"
    build = target.platform.build_command(target.image)
    plan = " --from-file=plan.json={out}/plan.json" if t.serve.api_keys else ""
    create = f"{kubectl} create secret generic {secret_name(t)}"
    if target.plan is None:
        steps = [f"{create} --from-file={KEY}={{out}}/{KEY}"] if t.serve.api_keys else []
    else:
        steps = [
            f"{build} && docker push {target.image}  # once, in a clone of the repository",
            f"openssl rand -hex 32 | {create} --from-file=secret=/dev/stdin{plan}",
        ]
    return [
        *steps,
        f"{kubectl} apply --filename {{out}}/manifests.yaml",
        f"{kubectl} logs --follow --selector {_first_pod(t)}",
    ]


def _first_pod(t: Topology) -> str:
    return ",".join(f"{k}={v}" for k, v in api_labels(t).items())


def secret_name(t: Topology) -> str:
    """Return what the secret is called that whoever applies the manifests makes."""
    return f"{t.name}-secret"


def _require_possible(target: Target) -> None:
    t = target.topology
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", t.name) or len(t.name) > MAX_NAME:
        raise ConfigError(
            t.where("name"),
            f"name: {t.name!r}: names in Kubernetes begin with a letter, end with no -, and have "
            f"here at most {MAX_NAME} characters",
        )
    if t.serve.host.startswith("127.") or t.serve.host == "localhost":
        raise ConfigError(
            t.where("serve.host"),
            f"serve.host: {t.serve.host} is not reached from outside a pod; give 0.0.0.0",
        )
    if t.container.image is None and target.plan is not None:
        tag = f"REGISTRY/{target.platform.own_image()}"
        raise ConfigError(
            "container.image",
            f"missing; nodes pull one with v4-ascend in it, which nobody "
            f"publishes: {target.platform.build_command(tag)}, push it and name it here",
        )
    if (size := len(target.plan_text.encode())) > MAX_CONFIGMAP_BYTES:
        raise ConfigError(
            t.where("layout"),
            f"the plan has {size:,} bytes, a ConfigMap at most {MAX_CONFIGMAP_BYTES:,}",
        )
    has_npus = target.platform.mindcluster is not None
    if t.kubernetes.workload == "ascend-job" and not has_npus:
        raise ConfigError(
            t.where("kubernetes.workload"),
            f"kubernetes.workload: ascend-job is of NPUs, not {target.platform.family}; "
            "take leader-worker-set or volcano-job",
        )
    if t.kubernetes.workload == "ascend-job" and target.plan is None and len(target.hosts) > 1:
        raise ConfigError(
            t.where("kubernetes.workload"),
            "kubernetes.workload: ascend-job reaches its first pod by a service of one port, and "
            "vLLM's hosts meet at several; take leader-worker-set or volcano-job",
        )


@dataclass(frozen=True)
class _Job:
    """What the three kinds of workload are made of."""

    target: Target

    @property
    def topology(self) -> Topology:
        return self.target.topology

    @property
    def n_hosts(self) -> int:
        return len(self.target.hosts)

    @property
    def devices_per_pod(self) -> int:
        """Devices a pod asks for: all of a node's where there are several pods."""
        return max(len(p.devices) for p in self.target.processes)

    def pods(self, which: tuple[str, str], first: str, **more: Any) -> Pods:
        secret = secret_name(self.topology)
        return Pods(self.target, self.devices_per_pod, secret, which, first, **more)

    def metadata(self, **more: dict[str, str]) -> dict[str, Any]:
        t = self.topology
        name = {"name": t.name, "namespace": t.kubernetes.namespace}
        return name | {k: v for k, v in more.items() if v}

    def annotations(self) -> dict[str, str]:
        """Tell Huawei's scheduler how chips must lie: whole logical supernodes and racks."""
        cluster = self.target.platform.mindcluster
        if cluster is None:
            return {}
        usual = cluster.one_host if self.n_hosts == 1 else cluster.supernode
        policy = self.topology.kubernetes.schedule_policy or usual
        found = {"huawei.com/schedule_policy": policy}
        if policy.endswith("-sp"):
            n_supernodes = min(len(self.topology.cluster.supernodes), self.n_hosts)
            block = self.n_hosts // n_supernodes * self.devices_per_pod
            found["sp-block"] = str(block)
            if "-ra" in policy:
                found["ra-block"] = str(min(block, RACK_DEVICES))
        return found

    def labels(self) -> dict[str, str]:
        """Labels that MindCluster's operator and fault handling look for."""
        cluster = self.target.platform.mindcluster
        if cluster is None:
            return {}
        return {
            "ring-controller.atlas": cluster.ring_controller,
            "fault-scheduling": "grace",
            "fault-retry-times": str(RETRIES),
        }

    def scheduled(self, pods: Pods, is_first: bool) -> dict[str, Any]:
        """Return a template for Volcano with what it and MindCluster look for."""
        template = pods.template(is_first=is_first)
        metadata = template["metadata"]
        metadata["labels"] |= self.labels()
        metadata["annotations"] |= self.annotations()
        template["spec"]["schedulerName"] = "volcano"
        return template


def _leader_worker_set(job: _Job) -> dict[str, Any]:
    """One group of pods, all made anew when one is restarted."""
    pods = job.pods(("--index", "$(LWS_WORKER_INDEX)"), "$(LWS_LEADER_ADDRESS)")
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": job.metadata(),
        "spec": {
            "replicas": 1,
            "startupPolicy": "LeaderCreated",  # the first pod is ready after the others
            "leaderWorkerTemplate": {
                "size": job.n_hosts,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": pods.template(is_first=True),
                "workerTemplate": pods.template(is_first=False),
            },
        },
    }


def _volcano_job(job: _Job) -> dict[str, Any]:
    """Pods that are placed together, and started again together when one fails."""
    name = job.topology.name
    which = ("--other", "$(VC_TASK_INDEX)")  # each task counts its own pods
    pods = job.pods(which, f"{name}-first-0.{name}", visible_devices=True)
    tasks: list[dict[str, Any]] = [
        {"name": role, "replicas": n, "template": job.scheduled(pods, role == "first")}
        for role, n in (("first", 1), ("other", job.n_hosts - 1))
        if n
    ]
    for task in tasks:
        task["template"]["spec"]["restartPolicy"] = "Never"
    return {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "metadata": job.metadata(labels=job.labels(), annotations=job.annotations()),
        "spec": {
            "schedulerName": "volcano",
            "queue": job.topology.kubernetes.queue,
            "minAvailable": job.n_hosts,
            "maxRetry": RETRIES,
            # The first pod is ready after the others, which must know its name before.
            "plugins": {"env": [], "svc": ["--publish-not-ready-addresses=true"]},
            "policies": [
                {"event": "PodFailed", "action": "RestartJob"},
                {"event": "PodEvicted", "action": "RestartJob"},
            ],
            "tasks": tasks,
        },
    }


def _ascend_job(job: _Job) -> dict[str, Any]:
    """MindCluster's own job: its operator sets MASTER_ADDR and RANK in the container `ascend`.

    MASTER_ADDR is a service that leads to ready pods alone: with a readiness probe the others
    would never reach the first one, so it has none.
    """
    pods = job.pods(
        ("--index", "$(RANK)"), "$(MASTER_ADDR)", container="ascend", waits_for_ready=False
    )
    replicas = {
        role: {
            "replicas": n,
            "restartPolicy": "Never",
            "template": job.scheduled(pods, role == "Master"),
        }
        for role, n in (("Master", 1), ("Worker", job.n_hosts - 1))
        if n
    }
    labels = {"framework": "pytorch"} | job.labels()
    policy = {"minAvailable": job.n_hosts, "queue": job.topology.kubernetes.queue}
    return {
        "apiVersion": "mindxdl.gitee.com/v1",
        "kind": "AscendJob",
        "metadata": job.metadata(labels=labels, annotations=job.annotations()),
        "spec": {
            "schedulerName": "volcano",
            "runPolicy": {"backoffLimit": RETRIES, "schedulingPolicy": policy},
            "successPolicy": "AllWorkers",
            "replicaSpecs": replicas,
        },
    }


def _config_map(t: Topology, of: str, data: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{t.name}-{of}", "namespace": t.kubernetes.namespace},
        "data": data,
    }


def _service(t: Topology) -> dict[str, Any]:
    """Where clients find the API. Its name is not the job's: controllers take that one."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{t.name}-api", "namespace": t.kubernetes.namespace},
        "spec": {
            "selector": api_labels(t),
            "ports": [{"name": "http", "port": t.serve.port, "targetPort": "http"}],
        },
    }
