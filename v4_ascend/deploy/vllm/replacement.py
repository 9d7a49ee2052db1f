"""Other commands in the place of those that run: with downtime, and a way back.

vLLM takes its address for itself, and its memory at the start: nothing of it can wait beside
another one, as a shadow of the native engine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from v4_ascend.deploy.processes import Report
from v4_ascend.deploy.replacement import stop_other
from v4_ascend.deploy.state import Supervisor, generations, vacant
from v4_ascend.deploy.vllm.deployment import VllmDeployment
from v4_ascend.deploy.vllm.work import Difference, Work, differences
from v4_ascend.errors import DeployError, V4AscendError

Conformance = Callable[[str], None] | None


@dataclass(frozen=True)
class Running:
    """Who serves, what he runs, and how that differs from what is wanted."""

    supervisor: Supervisor
    work: Work
    differences: tuple[Difference, ...]


def find_running(wanted: Work) -> Running | None:
    """Return what serves under the deployment's name, or None if nothing does.

    Raises:
        DeployError: it is of another engine, starts or ends just now, or cannot be known.
    """
    found = generations(wanted.plan.name)
    if not found:
        return None
    first = found[0]
    if first.engine != "vllm":
        raise DeployError(
            f"{first.name} runs already with engine {first.engine} (pid {first.pid}, {first.url}); "
            f"v4-ascend down {first.name} first"
        )
    if first.phase != "serving" or len(found) > 1:
        pids = " and ".join(f"pid {s.pid} is {s.phase} it" for s in found)
        raise DeployError(
            f"{first.name}: {pids} just now; again once it serves, or v4-ascend down {first.name}"
        )
    work = Work.read(Path(first.folder))
    return Running(first, work, tuple(differences(work, wanted)))


class Successor(VllmDeployment):
    """Starts once the one that served has ended, or after one that did not become ready."""

    before: Supervisor | None = None
    down_since: float | None = None

    def _make_room(self) -> None:
        """Take the address from who has it; one that another process has stops nothing."""
        if self.before is None or self.before.url != self.url:
            super()._make_room()
        if self.before is not None:
            self.down_since = time.monotonic()
            stop_other(self.before, self.drain_s, self.report)
            super()._make_room()

    def _take_over(self) -> None:
        super()._take_over()
        if self.down_since is not None:
            self.report(f"was down for {time.monotonic() - self.down_since:.1f} s")


def replace_stopped(
    wanted: Work,
    running: Running,
    report: Report,
    drain_s: float,
    timeout_s: float,
    conformance: Conformance,
) -> None:
    """Stop what serves, start what is wanted, and serve; go back if it does not become ready.

    Raises:
        V4AscendError: what `VllmDeployment.run` raises; if it went back, once that has ended too.
    """
    before = running.supervisor
    new = Successor(wanted, report, drain_s, conformance, vacant(wanted.plan.name))
    new.before = before
    try:
        new.run(timeout_s)
    except V4AscendError as first:
        if new.has_served or new.down_since is None:
            raise
        report(f"failed: {first}")
        report("going back to what ran before")
        back = Successor(
            running.work,
            lambda line: report(f"gone back: {line}"),
            drain_s,
            folder=Path(before.folder),
        )
        back.down_since = new.down_since
        try:
            back.run(timeout_s)
        except V4AscendError as second:
            raise DeployError(f"{first}; and going back: {second}") from second
        raise DeployError(f"{before.name} went back to what ran before: {first}") from first
