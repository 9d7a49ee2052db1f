"""Run a plan: a front and torchrun here, torchrun on the other hosts by ssh, and us watching."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import BinaryIO

import httpx
import msgspec

from v4_ascend.config.private import open_private, private_folder, private_opener
from v4_ascend.deploy import agent
from v4_ascend.deploy.port import require_free
from v4_ascend.deploy.ssh import SSH
from v4_ascend.deploy.state import Supervisor, start_time, state_root
from v4_ascend.deploy.torchrun import address_of, hosts_of, torchrun
from v4_ascend.errors import DeadlineError, DeployError, V4AscendError
from v4_ascend.runtime.link import Address
from v4_ascend.supernode.plan import Plan

POLL_SECONDS = 0.1
KILL_SECONDS = 5
Report = Callable[[str], None]


class Deployment:
    """One deployment's processes. Whatever happens, none outlives `run`."""

    def __init__(self, plan: Plan, report: Report, drain_s: float) -> None:
        self.plan, self.report, self.drain_s = plan, report, drain_s
        self.folder = state_root() / plan.name
        self.url = f"http://{plan.host}:{plan.port}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._signals = 0
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
                require_free(self.plan.host, self.plan.port)
                self._clear()
                self._start("front", [sys.executable, "-m", "v4_ascend.runtime.front",
                                      str(self.folder), str(self.drain_s)])  # fmt: skip
                self._wait_for_link(timeout_s)
                self._gather(timeout_s)
                if not self._signals:
                    first, *others = hosts_of(self.plan)
                    meeting = _meeting(first)
                    self._start(
                        "ranks",
                        *torchrun(self.plan, first, self.folder, meeting if others else None),
                    )
                    for host in others:
                        self._start_agent(host, meeting)
                    self._announce()
                self._wait_ready(timeout_s)
                while not self._signals:
                    self._require_alive()
                    time.sleep(POLL_SECONDS)
                self.report("draining; once more to stop at once")
            except V4AscendError as e:
                self._failure = str(e)
                raise
            finally:
                self._stop()
                (self.folder / "supervisor.json").unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only one that runs this deployment."""
        with open(self.folder / "lock", "w", opener=private_opener) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise DeployError(f"{self.plan.name}: another process is deploying it") from e
            yield

    @contextmanager
    def _signals_counted(self) -> Iterator[None]:
        old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _clear(self) -> None:
        """Leave nothing of an earlier run that could be taken for this one's."""
        for log in ("link.json", "ranks.log", *(p.name for p in self.folder.glob("ranks-*.log"))):
            (self.folder / log).unlink(missing_ok=True)
        self.plan.write(self.folder / "plan.json")

    def _start(
        self,
        name: str,
        command: list[str],
        env: dict[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        with self._output(name) as log:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # a Ctrl-C is ours to pass on
            )
        self._processes[name] = process
        return process

    def _gather(self, timeout_s: float) -> None:
        """Wait for other hosts; those that are reached by ssh are started from here."""

    def _release(self) -> None:
        """Tell other hosts that it is over; ssh tells them by its end."""

    def _start_agent(self, host: str, meeting: str) -> None:
        """Start a host's ranks over ssh, and keep telling them that we are here."""
        bundle = agent.Bundle.of(self.plan, host, Address.read(self.folder), meeting)
        self._start_remote(f"ranks-{host}", host, "v4_ascend.deploy.agent", bundle)

    def _start_remote(self, name: str, host: str, module: str, bundle: msgspec.Struct) -> None:
        """Run a module on a host: its first line of input is `bundle`, then a beat follows."""
        remote = f"{shlex.quote(sys.executable)} -m {module}"
        process = self._start(name, [*SSH, host, remote], stdin=subprocess.PIPE)

        def keep_telling() -> None:
            line = msgspec.json.encode(bundle) + b"\n"
            with suppress(OSError, ValueError):  # it ended, and is missed elsewhere
                while process.stdin is not None:
                    os.write(process.stdin.fileno(), line)
                    line = b"\n"
                    time.sleep(agent.BEAT_SECONDS)

        Thread(target=keep_telling, daemon=True).start()

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

    def _log(self, name: str) -> str:
        """Say where what a process writes can be read."""
        return str(self.folder / f"{name}.log")

    def _output(self, name: str) -> BinaryIO:
        """Open what a process writes to."""
        return open_private(Path(self._log(name)))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _stop(self) -> None:
        """Let the front drain, then end the ranks; kill what does not listen."""
        before = self._signals
        self._end(["front"], self.drain_s + KILL_SECONDS, before)
        self._release()
        self._end([n for n in self._processes if n != "front"], KILL_SECONDS, before)

    def _end(self, names: list[str], patience: float, n_signals: int) -> None:
        processes = [self._processes[n] for n in names if n in self._processes]
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()  # an agent ends by itself, and says so by ending
            elif process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + patience + (KILL_SECONDS if len(processes) > 1 else 0)
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if self._signals > max(n_signals, 1):
                break
            time.sleep(POLL_SECONDS)
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _meeting(first: str) -> str:
    """Choose a port on this host, the first one, where the ranks of all hosts meet."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.bind(("", 0))
        return f"{address_of(first)}:{s.getsockname()[1]}"
