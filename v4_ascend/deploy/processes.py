"""The processes of a deployment: started, watched, ended; signals that tell us to end."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import BinaryIO

import msgspec

from v4_ascend.config.private import open_private, private_opener
from v4_ascend.deploy import agent
from v4_ascend.deploy.ssh import SSH
from v4_ascend.deploy.state import LOCK
from v4_ascend.errors import DeadlineError, DeployError
from v4_ascend.supernode.plan import Plan

POLL_SECONDS = 0.1
KILL_SECONDS = 5
Report = Callable[[str], None]


class Processes:
    """What one deployment started, by name, and the folder it is of."""

    def __init__(self, plan: Plan, report: Report, folder: Path) -> None:
        self.plan, self.report, self.folder = plan, report, folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._signals = 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only one that runs this deployment."""
        with open(self.folder / LOCK, "a", opener=private_opener) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise DeployError(f"{self.plan.name}: another process is deploying it") from e
            os.utime(lock.fileno())
            yield

    @contextmanager
    def _signals_counted(self) -> Iterator[None]:
        old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _start(
        self,
        name: str,
        command: list[str],
        env: dict[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        with self._output(name) as log:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=pass_fds,
                start_new_session=True,  # a Ctrl-C is ours to pass on
            )
        self._processes[name] = process
        return process

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

    def _end(
        self,
        names: list[str],
        patience: float,
        n_signals: int,
        farewell: int | None = signal.SIGTERM,
    ) -> None:
        """Wait for processes to end, told so by `farewell` if they are not yet; then kill them."""
        processes = [self._processes[n] for n in names if n in self._processes]
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()  # an agent ends by itself, and says so by ending
            elif process.poll() is None and farewell is not None:
                process.send_signal(farewell)
        deadline = time.monotonic() + patience + (KILL_SECONDS if len(processes) > 1 else 0)
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if self._signals > max(n_signals, 1):
                break
            time.sleep(POLL_SECONDS)
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
