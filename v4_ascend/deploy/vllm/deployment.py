"""Run the processes of vLLM: start them in order, wait until they answer, check, watch, end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from v4_ascend import __version__
from v4_ascend.config.private import private_folder, write_private
from v4_ascend.config.topology import Topology
from v4_ascend.deploy.agent import end_session
from v4_ascend.deploy.deployment import Deployment
from v4_ascend.deploy.port import require_free
from v4_ascend.deploy.processes import KILL_SECONDS, POLL_SECONDS, Report
from v4_ascend.deploy.state import Phase, Supervisor, lost, start_time
from v4_ascend.deploy.vllm.agent import Order
from v4_ascend.deploy.vllm.canary import canary
from v4_ascend.deploy.vllm.here import filled_in
from v4_ascend.deploy.vllm.launches import PROXY, Launch
from v4_ascend.deploy.vllm.work import Work
from v4_ascend.errors import BackendUnavailableError, ConfigError, DeployError, NotYetError

STATE = "vllm.json"  # what `status` reads beside supervisor.json
PROXY_KEY = "V4_ASCEND_PD_PROXY"


class VllmDeployment(Deployment):
    """A deployment whose processes are vLLM's. Whatever happens, none outlives `run`."""

    def __init__(
        self,
        work: Work,
        report: Report,
        drain_s: float,
        conformance: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Take what is to run; `conformance` gets the URL and raises if a case fails."""
        super().__init__(work.plan, report, drain_s, folder)
        self.work, self.launches, self.conformance = work, work.launches, conformance
        self.digest, self.url = work.digest, work.url

    def run(self, timeout_s: float) -> None:
        """Start, wait until ready and checked, and serve until SIGINT or SIGTERM.

        Raises:
            PortInUseError: before anything is started.
            DeployError: a process ended that should not have.
            DeadlineError: not ready in time.
            ParityError: it answers otherwise than the reference.
        """
        private_folder(self.folder)
        with self._locked(), self._signals_counted():
            try:
                self._write_state("starting", None)
                self._announce("starting")
                for gone in lost(self.plan.name):
                    gone.forget()
                self._make_room()
                for log in self.folder.glob("*.log"):
                    if log.name != "supervisor.log":
                        log.unlink()
                self.work.write(self.folder)
                deadline = time.monotonic() + timeout_s
                for order in sorted({x.order for x in self.launches}):
                    together = [x for x in self.launches if x.order == order]
                    for launch in together if not self._signals else ():
                        self._launch(launch)
                    for launch in together:
                        self._wait_for(launch, deadline, timeout_s)
                if not self._signals:
                    self._check()
                while not self._signals:
                    self._require_alive()
                    time.sleep(POLL_SECONDS)
                self.report("stopping; once more to stop at once")
            finally:
                self._stop()
                for name in ("supervisor.json", STATE):
                    (self.folder / name).unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Have the address free, before anything is started."""
        require_free(self.plan.host, self.plan.port)

    def _launch(self, launch: Launch) -> None:
        env, argv = launch.env | self.work.environment, list(launch.argv)
        if launch.role == "proxy":
            argv[1] = os.environ[PROXY_KEY]
        if launch.host == self.launches[0].host:
            here = os.environ | filled_in(env, launch.host)
            self._start(launch.name, argv, here)
        else:
            order = Order(__version__, launch.host, argv, env)
            self._start_remote(launch.name, launch.host, "v4_ascend.deploy.vllm.agent", order)

    def _wait_for(self, launch: Launch, deadline: float, timeout_s: float) -> None:
        """Wait until a process answers; one without an API must only live."""
        while launch.url is not None and not self._signals:
            self._require_alive()
            # A proxy has no models of its own: that it answers at all is what it can show.
            if _answers(launch.url) if launch.role == "proxy" else self._is_up(launch.url):
                self.report(f"{launch.name} answers at {launch.url}")
                return
            self._require_time(deadline, f"{launch.name} does not answer", timeout_s)
            time.sleep(POLL_SECONDS)

    def _is_up(self, url: str) -> bool:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code != 200:
                return False
            answer = httpx.get(f"{url}/v1/models", headers=self.work.headers, timeout=5)
        except httpx.TransportError:
            return False
        if answer.status_code != 200:
            raise DeployError(f"{self.plan.name}: {url}/v1/models: status {answer.status_code}")
        served = [m["id"] for m in answer.json()["data"]]
        if self.plan.model_name not in served:
            raise DeployError(
                f"{self.plan.name}: {url} serves {', '.join(served)}, not {self.plan.model_name}"
            )
        return True

    def _check(self) -> None:
        """Run the canary and, if asked to, the conformance cases; say that it is ready."""
        found, reference = "unreferenced", self.work.reference
        if reference is not None:
            self._write_state("checking", None)
            found = str(canary(self.url, self.plan.model_name, Path(reference), self.work.headers))
        if self.conformance is not None:
            self.conformance(self.url)
        self._write_state("ready", found)
        self._announce("serving")
        self._take_over()
        self.report(f"ready: {self.url}/v1, model {self.plan.model_name}, canary {found}")

    def _take_over(self) -> None:
        """Be the one that serves."""
        self.has_served = True

    def _announce(self, phase: Phase) -> None:
        pid = os.getpid()
        me = Supervisor(
            *(self.plan.name, pid, start_time(pid) or 0, self.url, self.digest),
            model=self.plan.model_name,
            engine="vllm",
            phase=phase,
            version=__version__,
        )
        me.write(self.folder)

    def _write_state(self, state: str, found: str | None) -> None:
        processes = [{"name": x.name, "host": x.host, "url": x.url} for x in self.launches]
        said = json.dumps({"state": state, "canary": found, "processes": processes})
        write_private(self.folder / STATE, said)

    def _stop(self) -> None:
        """End the last started first; what vLLM started itself goes with it."""
        before = self._signals
        processes = list(reversed(self._processes.values()))
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()  # an agent ends what it holds, and says so by ending
            elif process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.drain_s + 2 * KILL_SECONDS
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if self._signals > max(before, 1):
                break
            time.sleep(POLL_SECONDS)
        for process in processes:
            end_session(process)


def require_startable(t: Topology, launches: tuple[Launch, ...]) -> None:
    """Refuse what cannot be started here, before anything is.

    Raises:
        BackendUnavailableError: there is no `vllm` here.
        NotYetError, ConfigError: what the topology asks for cannot be started here.
    """
    if shutil.which("vllm") is None:
        raise BackendUnavailableError(
            "vllm: no such command on PATH; install vLLM (on Ascend with vllm-ascend), or "
            "print the commands with --dry-run and run them where it is"
        )
    if not any(x.role == "proxy" for x in launches):
        return
    if t.model.reference is not None:
        raise NotYetError(
            t.where("model.reference"),
            "model.reference: not yet with prefill and decode apart and engine vllm; leave it "
            "away, and the canary is called unreferenced",
        )
    if PROXY_KEY not in os.environ:
        raise ConfigError(
            PROXY_KEY,
            f"not set; prefill and decode apart need vllm-ascend's {PROXY} (examples/"
            "disaggregated_prefill_v1 of its repository): give its path",
        )


def status(folder: Path) -> dict[str, Any]:
    """Return the state of a running deployment, and which of its processes answer."""
    said: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    rows = said["processes"]
    for row in rows:
        row["is_ready"] = row["url"] is None or _answers(row["url"])
    if said["state"] == "ready" and not all(r["is_ready"] for r in rows):
        said["state"] = "no answer of " + ", ".join(r["name"] for r in rows if not r["is_ready"])
    return said


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code < 500
    except httpx.TransportError:
        return False
