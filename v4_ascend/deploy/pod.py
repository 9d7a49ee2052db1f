"""One host of a deployment that starts by itself, as pods and containers do: no ssh.

The first host runs front and ranks, the others ranks alone. Each ends, with a reason and a code
that is not 0, when another is lost: whoever started them then starts them all again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import BinaryIO

from v4_ascend.deploy.agent import GIVE_UP_SECONDS, link_of, ranks_of, stop
from v4_ascend.deploy.deployment import Deployment
from v4_ascend.deploy.processes import KILL_SECONDS, POLL_SECONDS, Report
from v4_ascend.deploy.rollcall import Call, Go, Over, RollCall
from v4_ascend.deploy.torchrun import hosts_of
from v4_ascend.errors import DeadlineError, DeployError
from v4_ascend.runtime.link import Address
from v4_ascend.supernode.plan import Plan

LISTEN_SECONDS = 0.2
TELL_SECONDS = 10.0  # between two words about what is waited for
MARGIN_SECONDS = 2 * KILL_SECONDS + 5  # of a host that waits until the first one has drained
TOGETHER_SECONDS = 1.0  # hosts are often stopped together: then there is no problem with one
HERE = "above"  # what processes write goes where our own words go


class FirstHost(Deployment):
    """The first host: a deployment whose other hosts come by themselves."""

    def __init__(
        self, plan: Plan, report: Report, drain_s: float, port: int, secret: str | None
    ) -> None:
        """Take what to run; `secret` is None where there is one host."""
        super().__init__(plan, report, drain_s)
        self._port, self._secret = port, secret
        self._call: RollCall | None = None

    def run(self, timeout_s: float) -> None:
        """As a deployment does; hosts that do not come, or are lost, are named.

        Raises:
            PortInUseError: before anything is started.
            DeployError: a process ended that should not have, or a host is lost or being stopped.
            DeadlineError: a host did not come, or it is not ready in time.
        """
        if self._secret is None:
            super().run(timeout_s)
            return
        self._call = RollCall(self.plan, self._port, self._secret)
        known = len(self._flight())
        try:
            super().run(timeout_s)
        finally:
            self._release()
            self._call.close()
            for line in self._flight()[known:]:  # the file goes with the container
                self.report(f"flight: {line}")

    def _gather(self, timeout_s: float) -> None:
        if self._call is None:
            return
        deadline, waited_for = time.monotonic() + timeout_s, [""]
        while (missing := self._call.missing()) and not self._signals:
            self._require_alive()
            if missing != waited_for:
                self.report(f"waiting for {', '.join(missing)} at port {self._port}")
                waited_for = missing
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{self.plan.name}: {', '.join(missing)} did not come within {timeout_s:g} s; "
                    f"look at its own log: it must have this secret and reach port {self._port}"
                )
            time.sleep(POLL_SECONDS)
        for line in self._call.machines():
            self.report(line)

    def _start_agent(self, host: str, meeting: str) -> None:
        if self._call is not None:
            self._call.go(link_of(Address.read(self.folder)), meeting)

    def _require_alive(self) -> None:
        # A host's own word comes before that of a process here, which may have missed it.
        if self._call is not None and (problem := self._call.problem()) is not None:
            time.sleep(TOGETHER_SECONDS)
            if self._signals:
                return
            raise DeployError(f"{self.plan.name}: {problem}")
        super()._require_alive()

    def _release(self) -> None:
        if self._call is not None:
            self._call.over(self._failure)

    def _flight(self) -> list[str]:
        """Return what is written of what ranks did when one was lost."""
        file = self.folder / "flight.log"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def _log(self, name: str) -> str:
        return HERE

    def _output(self, name: str) -> BinaryIO:
        return os.fdopen(os.dup(1), "wb")


class OtherHost:
    """A host with ranks alone."""

    def __init__(
        self,
        plan: Plan,
        index: int,
        first: str,
        port: int,
        secret: str,
        report: Report,
        drain_s: float,
    ) -> None:
        self.plan, self.host = plan, hosts_of(plan)[index]
        self.report, self.drain_s = report, drain_s
        self._first, self._port, self._secret = first, port, secret
        self._signals = 0

    def run(self, timeout_s: float) -> None:
        """Find the first host, run the ranks, and end with it.

        Raises:
            DeployError: it is lost or has failed, it refuses this host, or the ranks ended.
            DeadlineError: its name did not resolve, or it did not answer, in time.
        """
        with self._signals_counted():
            deadline = time.monotonic() + timeout_s
            self._wait_for_name(deadline, timeout_s)
            if self._signals:
                return
            call = Call(self.plan, self.host, self._first, self._port, self._secret)
            try:
                go = self._wait_for_go(call, deadline, timeout_s)
                if go is not None:
                    self._run(call, go)
            finally:
                call.close()

    def _wait_for_name(self, deadline: float, timeout_s: float) -> None:
        """Names of pods are known late, and not at all while the first one is not scheduled."""
        told = float("-inf")
        while not self._signals:
            try:
                socket.gethostbyname(self._first)
            except OSError as e:
                why = e.strerror
            else:
                return
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{self.host}: the first host's name {self._first} did not resolve "
                    f"within {timeout_s:g} s ({why})"
                )
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                self.report(f"{self.host}: waiting for the name {self._first} ({why})")
            time.sleep(1)

    def _wait_for_go(self, call: Call, deadline: float, timeout_s: float) -> Go | None:
        """Call until everybody is here; None if told to end before."""
        where = f"{self._first}:{self._port}"
        self.report(f"{self.host}: calling {where}")
        while not self._signals:
            call.say()
            answer = call.hear(LISTEN_SECONDS)
            if isinstance(answer, Go):
                return answer
            if isinstance(answer, Over):
                self._end(answer)
                return None
            if time.monotonic() > deadline:
                why = "others did not come" if call.heard is not None else call.why_silent()
                raise DeadlineError(f"{self.host}: no go of {where} in {timeout_s:g} s: {why}")
        call.say(ended="was stopped")
        return None

    def _run(self, call: Call, go: Go) -> None:
        command, env = ranks_of(self.plan, self.host, self.plan.name, go.link, go.meeting)
        self.report(f"{self.host}: starting ranks")
        ranks = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
        ended = "was stopped"
        try:
            self._follow(call, go, ranks)
        except DeployError as e:
            ended = f"ended: {e}"
            raise
        finally:
            stop(ranks, KILL_SECONDS)
            call.say(ended=ended)

    def _follow(self, call: Call, go: Go, ranks: subprocess.Popen[bytes]) -> None:
        """Go on until told to end, or until there is nothing to go on with."""
        leave_by: float | None = None
        while self._signals < 2:
            now = time.monotonic()
            if self._signals and leave_by is None:
                leave_by = now + self.drain_s + MARGIN_SECONDS
                self.report(f"{self.host}: to be stopped once {self._first} has drained")
            call.say(leaving="is being stopped" if self._signals else None)
            answer = call.hear(LISTEN_SECONDS)
            if isinstance(answer, Over):
                self._end(answer)
                return
            if answer not in (None, go):
                raise DeployError(f"{self.host}: {self._first} was started again")
            if (code := ranks.poll()) is not None:
                raise DeployError(f"{self.host}: ranks ended with exit code {code}")
            if call.heard is not None and now - call.heard > GIVE_UP_SECONDS:
                raise DeployError(
                    f"{self.host}: {self._first} is lost: no word for {GIVE_UP_SECONDS:g} s"
                )
            if leave_by is not None and now > leave_by:
                return

    def _end(self, answer: Over) -> None:
        """End as told; that it has failed is no failure of a host that is being stopped."""
        if answer.failure is not None and not self._signals:
            raise DeployError(f"{self.host}: told to end: {answer.failure}")
        self.report(f"{self.host}: told to end")

    @contextmanager
    def _signals_counted(self) -> Iterator[None]:
        def count(number: int, frame: FrameType | None) -> None:
            self._signals += 1

        old = {s: signal.signal(s, count) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
