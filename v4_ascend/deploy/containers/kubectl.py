"""A deployment on Kubernetes, by `kubectl` and whatever cluster its configuration names."""

from __future__ import annotations

import json
import secrets
from typing import Any

from v4_ascend.deploy.containers.given import Given
from v4_ascend.deploy.containers.orchestrator import Container, run
from v4_ascend.deploy.containers.pods import HOST, KEY, NAME
from v4_ascend.deploy.containers.written import SECRET_BYTES

# What a kubelet says of a container that waits for something nobody will bring.
HOPELESS = (
    "CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "ErrImagePull",
    "ImagePullBackOff", "InvalidImageName", "RunContainerError",
)  # fmt: skip


class Kubectl:
    """One deployment's objects in one namespace."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._file = str(given.folder / "manifests.yaml")

    def up(self) -> None:
        """Apply the manifests, the secret first: it is in no file, and comes by standard input."""
        if self._given.has_secret:
            self._kubectl("apply", "--filename", "-", stdin=json.dumps(self._secret()).encode())
        self._kubectl("apply", "--filename", self._file)

    def containers(self) -> list[Container]:
        """Ask for the pods."""
        selector = f"{NAME}={self._given.name}"
        said = self._kubectl("get", "pods", "--selector", selector, "--output", "json")
        pods = json.loads(said)["items"]
        first = [p["metadata"].get("labels", {}).get(HOST) != "first" for p in pods]
        return [_pod(p) for _, _, p in sorted(zip(first, range(len(pods)), pods, strict=True))]

    def down(self) -> None:
        """Delete what the manifests name, and the secret."""
        self._kubectl("delete", "--filename", self._file, "--ignore-not-found=true")
        if self._given.has_secret:
            name = f"{self._given.name}-secret"
            self._kubectl("delete", "secret", name, "--ignore-not-found=true")

    def logs(self) -> str:
        """Return what shows the first pod's logs."""
        selector = f"{NAME}={self._given.name},{HOST}=first"
        return f"kubectl --namespace {self._given.namespace} logs --follow --selector {selector}"

    def _secret(self) -> dict[str, Any]:
        """Return the pods' secret: their own, or vLLM's key, or the plan with keys in it."""
        folder, data = self._given.folder, {"secret": secrets.token_hex(SECRET_BYTES)}
        for name in (KEY, "plan.json"):
            if (folder / name).is_file():
                data[name] = (folder / name).read_text(encoding="utf-8")
        metadata = {"name": f"{self._given.name}-secret", "namespace": self._given.namespace}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data}

    def _kubectl(self, *words: str, stdin: bytes | None = None) -> str:
        return run(["kubectl", "--namespace", self._given.namespace, *words], stdin)


def _pod(pod: dict[str, Any]) -> Container:
    status = pod.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    containers = status.get("containerStatuses", ())
    waiting = [c["state"]["waiting"] for c in containers if "waiting" in c.get("state", {})]
    phase = str(status.get("phase", "Unknown"))
    reasons = [str(w.get("reason", "")) for w in waiting]
    hopeless = next((w for w in waiting if w.get("reason") in HOPELESS), None)
    trouble = f"{hopeless['reason']}: {hopeless.get('message', '')}" if hopeless else ""
    scheduled = conditions.get("PodScheduled", {})
    if phase == "Failed":
        trouble = str(status.get("reason") or "its container failed")
    elif scheduled.get("status") == "False":
        reasons = [f"not scheduled: {scheduled.get('message', '')}"]
    return Container(
        pod["metadata"]["name"],
        str(pod.get("spec", {}).get("nodeName", "no node")),
        ", ".join([phase, *filter(None, reasons)]),
        conditions.get("Ready", {}).get("status") == "True",
        trouble.strip(": "),
    )
