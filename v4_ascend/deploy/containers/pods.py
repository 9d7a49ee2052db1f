"""The pod of a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from v4_ascend.config.topology import Topology
from v4_ascend.deploy.containers import start
from v4_ascend.deploy.containers.target import (
    PLAN,
    SECRET,
    STATE,
    STOP_SECONDS,
    Target,
    host_command,
)
from v4_ascend.deploy.vllm.key import VARIABLE, only_key
from v4_ascend.deploy.vllm.show import ASKED

NAME, HOST = "app.kubernetes.io/name", "v4-ascend/host"
OWN_USER = 1000  # of Dockerfile.cuda
PROBE_SECONDS = 10
START_SECONDS = 300  # until the front listens; loading comes after it
READABLE = 0o400
KEY = "key"  # of the secret, with engine vllm
PORT_NAME = "ascendjob-port"  # MindCluster's operator makes a service of the port of this name


def api_labels(t: Topology) -> dict[str, str]:
    """Return the labels by which the pod is found that has the API."""
    return {NAME: t.name, HOST: "first"}


@dataclass(frozen=True)
class Pods:
    """What the pods of a deployment have in common.

    `which` and `first` are options of ``v4-ascend host`` with variables of the cluster in them.
    `visible_devices` tells Huawei's docker runtime what the scheduler chose.
    """

    target: Target
    devices_per_pod: int
    secret: str
    which: tuple[str, str]
    first: str
    container: str = "v4-ascend"
    waits_for_ready: bool = True
    visible_devices: bool = False

    def template(self, *, is_first: bool) -> dict[str, Any]:
        """Return the template of the first pod, which has the API, or of the others."""
        t, k = self.target.topology, self.target.topology.kubernetes
        labels = {NAME: t.name, HOST: "first" if is_first else "other"}
        spec: dict[str, Any] = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,  # variables of services are taken for settings
            "terminationGracePeriodSeconds": STOP_SECONDS,
            "securityContext": self._security(),
        }
        if k.host_network:
            spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
        if k.node_selector:
            spec["nodeSelector"] = dict(k.node_selector)
        spec["containers"] = [self._container(is_first=is_first)]
        spec["volumes"] = [v for v, _ in self._volumes()]
        plan = self.target.plan
        found = plan.digest if plan is not None else start.digest(self.target)
        annotations = {"v4-ascend/plan": found[:16]}  # another one is another pod
        return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}

    @property
    def resource(self) -> str | None:
        """The name of one device, None for a CPU."""
        usual = [r.value for r in self.target.platform.resources]
        return self.target.topology.kubernetes.resource or next(iter(usual), None)

    def _security(self) -> dict[str, Any]:
        seccomp = {"seccompProfile": {"type": "RuntimeDefault"}}
        if self.target.platform.user.value == "root":
            return seccomp
        user = {"runAsUser": OWN_USER, "runAsGroup": OWN_USER, "fsGroup": OWN_USER}
        return {"runAsNonRoot": True} | user | seccomp

    def _container(self, *, is_first: bool) -> dict[str, Any]:
        target, t = self.target, self.target.topology
        which = ("--index", "0") if is_first else self.which
        if target.plan is None:
            command, args = start.command(target, which, self.first)
        else:
            argv = host_command(t, which, self.first, target.timeout_s)
            command, args = target.platform.started(argv)
        capabilities: dict[str, Any] = {"drop": ["ALL"]}
        if target.platform.user.value == "root":
            capabilities = {"add": ["IPC_LOCK"]}  # memory that devices write to stays in place
        ports = [{"name": PORT_NAME, "containerPort": t.container.port}]
        if is_first:
            ports.insert(0, {"name": "http", "containerPort": t.serve.port})
        found: dict[str, Any] = {
            "name": self.container,
            "image": target.image,
            "imagePullPolicy": "IfNotPresent",
            "command": command,
            "args": args,
            "env": self._env(),
            "ports": ports,
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": capabilities},
            "volumeMounts": [m for _, m in self._volumes()],
        }
        if self.resource is not None:
            devices = {self.resource: self.devices_per_pod}
            found["resources"] = {"requests": devices, "limits": devices}
        if is_first:
            found |= self._probes()
        return found

    def _env(self) -> list[dict[str, Any]]:
        process = self.target.processes[0]
        known = {k: v for k, v in process.env.items() if v and v not in ASKED.values()}
        env: list[dict[str, Any]] = [
            {"name": k, "value": v.replace("$", "$$")} for k, v in known.items()
        ]
        own = [k for k, v in process.env.items() if v == ASKED["{address}"]]
        env += [_of_pod(k, "status.podIP") for k in ("V4_ASCEND_ADDRESS", *own)]
        if self.target.plan is None and only_key(self.target.topology):
            entry = {"secretKeyRef": {"name": self.secret, "key": KEY}}
            env.append({"name": VARIABLE, "valueFrom": entry})
        if self.visible_devices and self.target.platform.mindcluster is not None:
            chosen = f"metadata.annotations['{self.resource}']"
            env.append(_of_pod("ASCEND_VISIBLE_DEVICES", chosen))
        return env

    def _probes(self) -> dict[str, Any]:
        health = self.target.processes[0].health
        # Our front answers at once, vLLM once it has loaded.
        seconds = START_SECONDS if self.target.plan is not None else self.target.timeout_s
        live = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": PROBE_SECONDS}
        ready = {"httpGet": {"path": health.path if health else "/ready", "port": "http"}}
        found: dict[str, Any] = {
            "startupProbe": live | {"failureThreshold": seconds // PROBE_SECONDS},
            "livenessProbe": live | {"timeoutSeconds": 5, "failureThreshold": 6},
        }
        if self.waits_for_ready:
            found["readinessProbe"] = ready | {"periodSeconds": 5, "timeoutSeconds": 5}
        return found

    def _volumes(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return each volume with its mount."""
        target, t = self.target, self.target.topology
        shm = {
            "emptyDir": {"medium": "Memory", "sizeLimit": f"{target.platform.shared_memory.gib}Gi"}
        }
        found = [
            *self._own(),
            _volume("state", {"emptyDir": {}}, STATE, writable=True),
            _volume("shm", shm, "/dev/shm", writable=True),  # noqa: S108
            self._checkpoint(),
        ]
        if t.model.reference is not None:
            found.append(_volume("reference", _path(t.model.reference, "File"), t.model.reference))
        for i, m in enumerate(target.platform.mounts):
            kind = "File" if m.kind == "file" else "Directory"
            found.append(_volume(f"driver-{i}", _path(m.value, kind), m.value))
        return found

    def _own(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return what was written for these pods: plan and secret, or how vLLM is started."""
        t = self.target.topology
        if self.target.plan is None:
            return [_volume("start", {"configMap": {"name": f"{t.name}-start"}}, start.START)]
        secret = {"secretName": self.secret, "defaultMode": READABLE}
        own = {"secret": secret | {"items": [{"key": "secret", "path": "secret"}]}}
        plan: dict[str, Any] = {"configMap": {"name": f"{t.name}-plan"}}
        if t.serve.api_keys:
            items = [{"key": "plan.json", "path": "plan.json"}]
            plan = {"secret": secret | {"items": items}}
        return [_volume("plan", plan, PLAN), _volume("secret", own, SECRET)]

    def _checkpoint(self) -> tuple[dict[str, Any], dict[str, Any]]:
        t = self.target.topology
        inside, claim = t.model.checkpoint, t.kubernetes.checkpoint_claim
        if claim is None:
            return _volume("checkpoint", _path(inside, "Directory"), inside)
        name, _, path = claim.partition("/")
        source = {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}
        volume, mount = _volume("checkpoint", source, inside)
        return volume, mount | ({"subPath": path} if path else {})


def _volume(
    name: str, source: dict[str, Any], inside: str, *, writable: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    mount: dict[str, Any] = {"name": name, "mountPath": inside}
    return {"name": name} | source, mount if writable else mount | {"readOnly": True}


def _path(path: str, kind: str) -> dict[str, Any]:
    """Return a path of the node; a pod whose node lacks it says so and does not start."""
    return {"hostPath": {"path": path, "type": kind}}


def _of_pod(name: str, field: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}
