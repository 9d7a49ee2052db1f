"""Give a deployment to docker or Kubernetes, wait for it, take it back."""

from __future__ import annotations

import time

from v4_ascend.deploy.containers.docker import Compose
from v4_ascend.deploy.containers.given import Given, read
from v4_ascend.deploy.containers.kubectl import Kubectl
from v4_ascend.deploy.containers.orchestrator import Container, Orchestrator
from v4_ascend.deploy.containers.target import STOP_SECONDS
from v4_ascend.deploy.containers.written import Written
from v4_ascend.deploy.processes import Report
from v4_ascend.deploy.state import find
from v4_ascend.errors import DeadlineError, DeployError

POLL_SECONDS = 2.0


def orchestrator(given: Given) -> Orchestrator:
    """Return who runs a deployment."""
    return Compose(given) if given.launcher == "docker" else Kubectl(given)


def find_given(wanted: Given) -> Given | None:
    """Return what was given under the wanted one's name, None if nothing was.

    Raises:
        DeployError: something else runs under the name.
    """
    if (running := find(wanted.name)) is not None:
        raise DeployError(
            f"{wanted.name} runs already, not in containers (pid {running.pid}, {running.url}); "
            f"v4-ascend down {wanted.name} first"
        )
    before = read(wanted.name)
    if before is not None and (before.launcher, before.namespace) != (
        wanted.launcher,
        wanted.namespace,
    ):
        raise DeployError(
            f"{wanted.name} was given to {before.launcher} (namespace {before.namespace}); "
            f"v4-ascend down {wanted.name} first"
        )
    return before


def bring_up(given: Given, written: Written, timeout_s: float, report: Report) -> None:
    """Keep the files, give them over, and wait until the first host says that all are ready.

    Raises:
        DeployError: a command failed, or a container that will not become ready by itself.
        DeadlineError: not ready in time.
        BackendUnavailableError: docker or kubectl is not here.
    """
    given.write(written)
    its = orchestrator(given)
    its.up()
    report(f"given to {given.launcher}; waiting for {len(given.hosts)} hosts")
    deadline, last = time.monotonic() + timeout_s, ""
    while True:
        found = its.containers()
        if trouble := next((c for c in found if c.trouble), None):
            raise DeployError(
                f"{given.name}: {trouble.name} on {trouble.host}: {trouble.trouble}; v4-ascend "
                f"down {given.name} takes it back"
            )
        if is_ready(given, found):
            return
        if (now := summary(found)) != last:
            report(now)
            last = now
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"{given.name}: not ready after {timeout_s:g} s: {now}; it goes on, v4-ascend "
                f"down {given.name} takes it back"
            )
        time.sleep(POLL_SECONDS)


def is_ready(given: Given, found: list[Container]) -> bool:
    """Say whether every host has its containers and all are ready."""
    return len(found) >= len(given.hosts) and all(c.is_ready for c in found)


def summary(found: list[Container]) -> str:
    """Say how containers are, in a line."""
    return "; ".join(f"{c.name} on {c.host}: {c.state}" for c in found) or "no container yet"


def take_back(given: Given, report: Report) -> None:
    """Remove what was given, wait until it is gone, and forget it.

    Raises:
        DeployError: a command failed; nothing is forgotten then.
        DeadlineError: it is not gone in time.
    """
    its = orchestrator(given)
    its.down()
    deadline = time.monotonic() + 2 * STOP_SECONDS
    while left := its.containers() if given.launcher == "kubernetes" else []:
        if time.monotonic() > deadline:
            raise DeadlineError(f"{given.name}: still there: {summary(left)}")
        time.sleep(POLL_SECONDS)
    given.forget()
    report("taken back")
