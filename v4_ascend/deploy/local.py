"""Run a plan on this host: a front, torchrun with its ranks, and us watching both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import httpx

from v4_ascend.deploy.port import require_free
from v4_ascend.deploy.state import Supervisor, start_time, state_root
from v4_ascend.emulation.environment import environment
from v4_ascend.errors import DeadlineError, DeployError
from v4_ascend.runtime.draining import DRAIN_SECONDS
from v4_ascend.supernode.plan import Plan

POLL_SECONDS = 0.1
KILL_SECONDS = 5
MAX_RESTARTS = 3
Report = Callable[[str], None]


class LocalDeployment:
    """One deployment's processes. Whatever happens, none outlives `run`."""

    def __init__(self, plan: Plan, report: Report) -> None:
        self.plan, self.report = plan, report
        self.folder = state_root() / plan.name
        self.url = f"http://{plan.host}:{plan.port}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._signals = 0

    def run(self, timeout_s: float) -> None:
        """Start, wait until ready, and serve until SIGINT or SIGTERM.

        Raises:
            PortInUseError: before anything is started.
            DeployError: a process ended that should not have.
            DeadlineError: not ready in time.
        """
        require_free(self.plan.host, self.plan.port)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.folder / "link.json").unlink(missing_ok=True)
        self.plan.write(self.folder / "plan.json")
        old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._start("front", [sys.executable, "-m", "v4_ascend.runtime.front"])
            self._wait_for_link(timeout_s)
            if not self._signals:
                self._start("ranks", *_torchrun(self.plan))
                self._announce()
            self._wait_ready(timeout_s)
            while not self._signals:
                self._require_alive()
                time.sleep(POLL_SECONDS)
            self.report("draining; once more to stop at once")
        finally:
            self._stop()
            (self.folder / "supervisor.json").unlink(missing_ok=True)
            for number, handler in old.items():
                signal.signal(number, handler)

    def _start(self, name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [*command, str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # a Ctrl-C is ours to pass on
            )

    def _announce(self) -> None:
        pid = os.getpid()
        started = start_time(pid) or 0
        plan = self.plan
        me = Supervisor(plan.name, pid, started, self.url, plan.digest, plan.model_name)
        me.write(self.folder)

    def _wait_for_link(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not (self.folder / "link.json").exists() and not self._signals:
            self._require_alive()
            self._require_time(deadline, "the front did not come up", timeout_s)
            time.sleep(POLL_SECONDS)

    def _wait_ready(self, timeout_s: float) -> None:
        deadline, last = time.monotonic() + timeout_s, ""
        while not self._signals:
            self._require_alive()
            now = self._ready()
            state = str(now.get("state", "starting"))
            if now.get("total_bytes") and state == "loading":
                state = f"loading {100 * now['loaded_bytes'] // now['total_bytes']} %"  # type: ignore[operator]
            if state != last:
                self.report(
                    state
                    if state != "ready"
                    else f"ready: {self.url}/v1, model "
                    f"{self.plan.model_name}, canary {now['canary']}"
                )
                last = state
            if state == "ready":
                return
            if state == "failed":
                raise DeployError(f"{self.plan.name}: {now['reason']}; log: {self._log('ranks')}")
            self._require_time(deadline, "not ready", timeout_s)
            time.sleep(POLL_SECONDS)

    def _ready(self) -> dict[str, object]:
        try:
            answer: dict[str, object] = httpx.get(f"{self.url}/ready", timeout=5).json()
        except httpx.TransportError:
            return {}
        return answer

    def _require_alive(self) -> None:
        for name, process in self._processes.items():
            if (code := process.poll()) is not None:
                raise DeployError(
                    f"{self.plan.name}: {name} ended with exit code {code}; log: {self._log(name)}"
                )

    def _require_time(self, deadline: float, what: str, timeout_s: float) -> None:
        if time.monotonic() > deadline:
            log = self._log("ranks")
            raise DeadlineError(f"{self.plan.name}: {what} after {timeout_s:g} s; log: {log}")

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _stop(self) -> None:
        """Let the front drain, then end the ranks; kill what does not listen."""
        before = self._signals
        for name, patience in (("front", DRAIN_SECONDS + KILL_SECONDS), ("ranks", KILL_SECONDS)):
            process = self._processes.get(name)
            if process is None:
                continue
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + patience
            while process.poll() is None and time.monotonic() < deadline:
                if self._signals > max(before, 1):
                    break
                time.sleep(POLL_SECONDS)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _torchrun(plan: Plan) -> tuple[list[str], dict[str, str]]:
    """Return the ranks' command and environment; emulated ones run where torch_npu is."""
    python, env = sys.executable, dict(os.environ)
    if plan.emulated:
        python, env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = str(environment("npu")), "0"
    command = [
        *(python, "-m", "torch.distributed.run", "--nnodes", "1"),
        *("--nproc-per-node", str(plan.parallel.world_size)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("--max-restarts", str(MAX_RESTARTS)),
        # Slower than the front's watch: it must see which rank ended before all others are.
        *("--monitor-interval", "1"),
        *("-m", "v4_ascend.runtime.worker"),
    ]
    return command, env
