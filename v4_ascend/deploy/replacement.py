"""Put another plan in the place of one that serves: beside it where there is room, or after it.

Both ways the new one is a deployment of its own, in the deployment's other folder. Until its
canary has passed, what is killed of it takes nothing else along.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from v4_ascend.config.topology import Topology
from v4_ascend.deploy import control
from v4_ascend.deploy.changes import Change, Scope, changes, scope_of
from v4_ascend.deploy.deployment import FRONT_SECONDS, Deployment
from v4_ascend.deploy.doctor.facts import Answer
from v4_ascend.deploy.doctor.preflight import look
from v4_ascend.deploy.processes import KILL_SECONDS, POLL_SECONDS, Report
from v4_ascend.deploy.room import Room, find_room
from v4_ascend.deploy.state import Supervisor, generations, vacant
from v4_ascend.deploy.torchrun import hosts_of
from v4_ascend.errors import DeadlineError, DeployError, V4AscendError
from v4_ascend.supernode.plan import Plan
from v4_ascend.supernode.planning import PoolPlan

# Two processes on one NPU would both listen at HCCL's port 16666 of the device; CANN's variables.
SHARED_NPU = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")


@dataclass(frozen=True)
class Running:
    """Who serves, by which plan, and how the wanted one differs."""

    supervisor: Supervisor
    plan: Plan
    changes: tuple[Change, ...]

    @property
    def scope(self) -> Scope:
        """What the changes restart."""
        return scope_of(self.changes)


def find_running(wanted: Plan) -> Running | None:
    """Return what serves under the plan's name, or None if nothing does.

    Raises:
        DeployError: it cannot be replaced: somebody starts, ends or replaces it just now, or it
            is of another engine.
        ConfigError: its plan cannot be read.
    """
    found = generations(wanted.name)
    if not found:
        return None
    first, *others = found
    if first.engine != "native":
        raise DeployError(
            f"{wanted.name} runs already with engine {first.engine} (pid {first.pid}, {first.url});"
            f" v4-ascend down {wanted.name} first"
        )
    if first.phase != "serving":
        raise DeployError(
            f"{wanted.name}: pid {first.pid} is {first.phase} it just now; again once it has, "
            f"or v4-ascend down {wanted.name}"
        )
    plan = Plan.read(Path(first.folder) / "plan.json")
    running = Running(first, plan, tuple(changes(plan, wanted, first.version)))
    coming = next((s for s in others if s.phase == "starting"), None)
    if coming is not None and running.scope is Scope.ALL:
        raise DeployError(
            f"{wanted.name}: pid {coming.pid} is starting beside pid {first.pid} just now; again "
            f"once it has, or v4-ascend down {wanted.name}"
        )
    return running


def wait_until_alone(running: Running, timeout_s: float, report: Report) -> None:
    """Let one that was replaced before finish: there is no third folder.

    Raises:
        DeadlineError: it does not.
    """
    serving, deadline = running.supervisor, time.monotonic() + timeout_s
    for other in generations(serving.name):
        if other.pid == serving.pid:
            continue
        report(f"waiting for pid {other.pid}, which was replaced and finishes what it has")
        while other.is_running():
            if time.monotonic() > deadline:
                raise DeadlineError(f"{serving.name}: pid {other.pid} has not in {timeout_s:g} s")
            time.sleep(POLL_SECONDS)


def change_settings(running: Running, wanted: Plan) -> None:
    """Let the running front take other settings; nothing restarts.

    Raises:
        DeployError: it does not; it goes on as before.
    """
    # On the devices it has, whatever a new start would take.
    plan = wanted.model_copy(update={"ranks": running.plan.ranks})
    control.ask(running.supervisor, control.Settings(plan.model_dump_json()))


def room_beside(
    running: Running, topology: Topology, pool: PoolPlan, plan: Plan
) -> tuple[Room, list[Answer]]:
    """Ask the hosts what is free; return it with their answers."""
    answers = look(topology)
    facts = dict(zip(hosts_of(plan), [a.facts for a in answers], strict=False))
    return find_room(pool, plan, running.plan, facts), answers


class Shadow(Deployment):
    """Gets ready beside the one that serves, then takes its address and lets it finish."""

    def __init__(self, room: Room, report: Report, drain_s: float, before: Supervisor) -> None:
        super().__init__(room.plan, report, drain_s, vacant(room.plan.name))
        self._before = before
        if room.shares_devices and room.plan.backend == "ascend":
            for name in SHARED_NPU:
                os.environ.setdefault(name, "auto")

    def _take_address(self) -> socket.socket:
        return address_of(self._before, self.url) or super()._take_address()

    def _begin(self, timeout_s: float) -> None:
        """Stay unseen until the canary has passed."""

    def _take_over(self) -> None:
        """Listen beside the other one, and once that is so, send it away."""
        self._open()
        super()._take_over()
        self._send_away()

    def _open(self) -> None:
        super()._begin(FRONT_SECONDS)

    def _send_away(self) -> None:
        if self._signals:
            return  # `down` has told both
        try:
            control.ask(self._before, control.GiveWay(self.drain_s))
        except DeployError as e:
            now = Supervisor.read(Path(self._before.folder))
            if now is None or now.phase != "serving" or not self._before.is_running():
                return  # it goes or is gone
            self.report(f"{e}; killed: its front sees that, and gives way by itself")
            os.kill(now.pid, signal.SIGKILL)
        else:
            self.report(f"pid {self._before.pid} finishes what it has, {self.drain_s:g} s at most")


class Successor(Deployment):
    """Starts once the one that served has ended, or after one that did not become ready."""

    def __init__(
        self,
        plan: Plan,
        report: Report,
        drain_s: float,
        folder: Path,
        before: Supervisor | None = None,
        down_since: float | None = None,
    ) -> None:
        super().__init__(plan, report, drain_s, folder)
        self._before, self.down_since = before, down_since

    def _take_address(self) -> socket.socket:
        if self._before is None:
            return super()._take_address()
        # First the address: without it nothing is stopped.
        address = address_of(self._before, self.url) or super()._take_address()
        self.down_since = time.monotonic()
        self._stop_other(self._before)
        return address

    def _stop_other(self, other: Supervisor) -> None:
        stop_other(other, self.drain_s, self.report)

    def _take_over(self) -> None:
        super()._take_over()
        if self.down_since is not None:
            self.report(f"was down for {time.monotonic() - self.down_since:.1f} s")


def stop_other(other: Supervisor, drain_s: float, report: Report) -> None:
    """Let it drain, for as long as it and we say; then less politely."""
    report(f"stopping pid {other.pid}; new requests are refused from here on")
    for number, patience in (
        (signal.SIGTERM, drain_s),
        (signal.SIGTERM, 4 * KILL_SECONDS),  # the second says: at once
        (signal.SIGKILL, 4 * KILL_SECONDS),
    ):
        deadline = time.monotonic() + patience
        if other.is_running():
            os.kill(other.pid, number)
        while other.is_running() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def address_of(before: Supervisor, url: str) -> socket.socket | None:
    """Return the listening socket of who serves, if it is to stay at that address."""
    return control.ask(before, control.Address()) if before.url == url else None


def replace_stopped(
    plan: Plan, report: Report, drain_s: float, timeout_s: float, before: Running
) -> None:
    """Stop what serves, start the plan, and serve; go back if it does not become ready.

    Raises:
        V4AscendError: what `Deployment.run` raises; if it went back, once that has ended too.
    """
    new = Successor(plan, report, drain_s, vacant(plan.name), before.supervisor)
    try:
        new.run(timeout_s)
    except V4AscendError as first:
        if new.has_served or new.down_since is None:
            raise
        report(f"failed: {first}")
        report("going back to the plan before")
        back = Successor(
            before.plan,
            lambda line: report(f"gone back: {line}"),
            drain_s,
            Path(before.supervisor.folder),
            down_since=new.down_since,
        )
        try:
            back.run(timeout_s)
        except V4AscendError as second:
            raise DeployError(f"{first}; and going back: {second}") from second
        raise DeployError(f"{plan.name} went back to the plan before: {first}") from first
