"""Run a plan: a front and torchrun here, torchrun on the other hosts by ssh, and us watching."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
from pydantic import ValidationError

from v4_ascend import __version__
from v4_ascend.config.private import (
    private_folder,
    write_private,
)
from v4_ascend.deploy import agent, control
from v4_ascend.deploy.changes import Scope, changes, scope_of
from v4_ascend.deploy.port import bound
from v4_ascend.deploy.processes import KILL_SECONDS, POLL_SECONDS, Processes, Report
from v4_ascend.deploy.state import FILE, Phase, Supervisor, folders, lost, start_time
from v4_ascend.deploy.torchrun import address_of, hosts_of, torchrun
from v4_ascend.errors import DeployError, V4AscendError
from v4_ascend.runtime.link import Address
from v4_ascend.runtime.orders import GIVE_WAY, OPEN, ORDERS, PATIENCE, READ_PLAN
from v4_ascend.supernode.plan import Plan

FRONT_SECONDS = 10.0  # for a front that is well to follow an order


class Deployment(Processes):
    """One deployment's processes. Whatever happens, none outlives `run`."""

    def __init__(
        self, plan: Plan, report: Report, drain_s: float, folder: Path | None = None
    ) -> None:
        super().__init__(plan, report, folder if folder is not None else folders(plan.name)[0])
        self.drain_s = drain_s
        self.url = f"http://{plan.host}:{plan.port}"
        self.has_served = False
        self._inside: str | None = None
        self._address: socket.socket | None = None
        self._gives_way = False
        self._failure: str | None = None

    def run(self, timeout_s: float) -> None:
        """Start, wait until ready, and serve until SIGINT or SIGTERM.

        Raises:
            PortInUseError: before anything is started.
            DeployError: a process ended that should not have.
            DeadlineError: not ready in time.
        """
        private_folder(self.folder)
        with self._locked(), self._signals_counted():
            try:
                self._announce("starting")
                for gone in lost(self.plan.name):
                    gone.forget()
                self._address = self._take_address()
                self._clear()
                self._start_front()
                self._wait_for_link(timeout_s)
                self._begin(timeout_s)
                self._gather(timeout_s)
                if not self._signals:
                    self._start_ranks()
                ready = self._wait_ready(timeout_s)
                if ready is not None:
                    self._serve(str(ready["canary"]))
                self.report("draining; once more to stop at once")
            except V4AscendError as e:
                self._failure = str(e)
                raise
            finally:
                self._stop()
                (self.folder / FILE).unlink(missing_ok=True)

    def _take_address(self) -> socket.socket:
        """Have the deployment's address, before anything is started."""
        return bound(self.plan.host, self.plan.port)

    def _begin(self, timeout_s: float) -> None:
        """Listen as soon as there is a front: who comes is told that it loads."""
        self._order_front(OPEN, "is_open", True, timeout_s)

    def _serve(self, canary: str) -> None:
        """Serve until told to stop, or to give way to another."""
        with control.Control(self.folder) as questions:
            self._take_over()
            self.has_served = True
            self.report(f"ready: {self.url}/v1, model {self.plan.model_name}, canary {canary}")
            while not self._signals and not self._gives_way:
                self._require_alive()
                questions.answer(POLL_SECONDS, self._reply)
            self._announce("ending")

    def _take_over(self) -> None:
        """Be the one that serves."""
        self._announce("serving")

    def _reply(self, question: control.Question) -> socket.socket | None:
        """Do what another `deploy` asks.

        Raises:
            DeployError: why not.
        """
        match question:
            case control.Address():
                return self._address
            case control.Settings(text):
                self._change_settings(text)
            case control.GiveWay(drain_s):
                self._give_way(drain_s)
        return None

    def _give_way(self, drain_s: float) -> None:
        """Listen no more from here on; what has come is finished while we end."""
        self.drain_s, self._gives_way = drain_s, True
        write_private(self.folder / PATIENCE, str(drain_s))
        self._processes["front"].send_signal(GIVE_WAY)
        deadline = time.monotonic() + FRONT_SECONDS
        while self._ready().get("is_open") and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self.report("another has taken its place")

    def _change_settings(self, text: str) -> None:
        try:
            plan = Plan.model_validate_json(text)
        except ValidationError as e:
            raise DeployError(f"{self.plan.name}: that is no plan of this version") from e
        if scope_of(changes(self.plan, plan)) is Scope.ALL:
            raise DeployError(f"{self.plan.name}: more has changed than settings of the front")
        plan.write(self.folder / "plan.json")
        try:
            self._order_front(READ_PLAN, "plan", plan.digest, FRONT_SECONDS)
        except V4AscendError:
            self.plan.write(self.folder / "plan.json")
            raise
        self.plan = plan
        self._announce("serving")
        self.report("other settings of the front are in force")

    def _order_front(self, order: int, key: str, value: object, timeout_s: float) -> None:
        """Tell the front to do something, and wait until it says that it has."""
        self._processes["front"].send_signal(order)
        deadline = time.monotonic() + timeout_s
        while self._ready().get(key) != value and not self._signals:
            self._require_alive()
            self._require_time(deadline, "the front does not answer", timeout_s)
            time.sleep(POLL_SECONDS)

    def _clear(self) -> None:
        """Leave nothing of an earlier run that could be taken for this one's."""
        for log in ("link.json", "ranks.log", *(p.name for p in self.folder.glob("ranks-*.log"))):
            (self.folder / log).unlink(missing_ok=True)
        self.plan.write(self.folder / "plan.json")
        write_private(self.folder / PATIENCE, str(self.drain_s))

    def _start_front(self) -> None:
        """Start it with the deployment's address, and one where nobody but us asks it."""
        if self._address is None:
            raise ValueError("no address")
        with bound("127.0.0.1", 0) as inside:
            self._inside = f"http://127.0.0.1:{inside.getsockname()[1]}"
            fds = (self._address.fileno(), inside.fileno())
            module = (sys.executable, "-m", "v4_ascend.runtime.front")
            words = map(str, (self.folder, os.getpid(), *fds))
            # It inherits what is blocked, and so do threads that an import of its starts (numpy's
            # do): an order that comes to one of them would end it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)
            try:
                self._start("front", [*module, *words], pass_fds=fds)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._announce("starting")

    def _start_ranks(self) -> None:
        first, *others = hosts_of(self.plan)
        meeting = _meeting(first)
        command, env = torchrun(self.plan, first, self.folder, meeting if others else None)
        self._start("ranks", command, env)
        for host in others:
            self._start_agent(host, meeting)

    def _gather(self, timeout_s: float) -> None:
        """Wait for other hosts; those that are reached by ssh are started from here."""

    def _release(self) -> None:
        """Tell other hosts that it is over; ssh tells them by its end."""

    def _start_agent(self, host: str, meeting: str) -> None:
        """Start a host's ranks over ssh, and keep telling them that we are here."""
        address = Address.read(self.folder)
        bundle = agent.Bundle.of(self.plan, host, self.folder.name, address, meeting)
        self._start_remote(f"ranks-{host}", host, "v4_ascend.deploy.agent", bundle)

    def _announce(self, phase: Phase) -> None:
        """Let `status`, `down` and another `deploy` know that we are here, and how far."""
        pid, plan = os.getpid(), self.plan
        me = Supervisor(
            *(plan.name, pid, start_time(pid) or 0, self.url, plan.digest, plan.model_name),
            phase=phase,
            inside=self._inside,
            version=__version__,
        )
        me.write(self.folder)

    def _wait_for_link(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not (self.folder / "link.json").exists() and not self._signals:
            self._require_alive()
            self._require_time(deadline, "the front did not come up", timeout_s)
            time.sleep(POLL_SECONDS)

    def _wait_ready(self, timeout_s: float) -> dict[str, object] | None:
        """Return what the front says once it is ready; None if told to stop before."""
        deadline, last = time.monotonic() + timeout_s, ""
        while not self._signals:
            self._require_alive()
            now = self._ready()
            state = str(now.get("state", "starting"))
            if now.get("total_bytes") and state == "loading":
                state = f"loading {100 * now['loaded_bytes'] // now['total_bytes']} %"  # type: ignore[operator]
            if state == "ready":
                return now
            if state != last:
                self.report(state)
                last = state
            if state == "failed":
                raise DeployError(f"{self.plan.name}: {now['reason']}; log: {self._log('ranks')}")
            self._require_time(deadline, "not ready", timeout_s)
            time.sleep(POLL_SECONDS)
        return None

    def _ready(self) -> dict[str, object]:
        try:
            answer: dict[str, object] = httpx.get(f"{self._inside}/ready", timeout=5).json()
        except httpx.TransportError:
            return {}
        return answer

    def _stop(self) -> None:
        """Let the front drain, then end the ranks; kill what does not listen."""
        before = self._signals
        if self._address is not None:
            self._address.close()
        farewell = None if self._gives_way else signal.SIGTERM
        self._end(["front"], self.drain_s + KILL_SECONDS, before, farewell)
        self._release()
        self._end([n for n in self._processes if n != "front"], KILL_SECONDS, before)


def _meeting(first: str) -> str:
    """Choose a port on this host, the first one, where the ranks of all hosts meet."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.bind(("", 0))
        return f"{address_of(first)}:{s.getsockname()[1]}"
