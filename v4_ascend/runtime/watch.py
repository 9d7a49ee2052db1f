"""Which rank is lost, and which is to blame: from processes, heartbeats and failures."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from v4_ascend.runtime.link import is_alive
from v4_ascend.runtime.messages import Beat
from v4_ascend.supernode.plan import Plan, rank_name

# A rank that ended is the cause of others' failures, not they of its. Here its process is seen
# to be gone; of another host only its heartbeats, one a second, are seen to be missing.
BLAME_SECONDS = {True: 0.5, False: 3.0}
QUIET_SECONDS = 2.2
SILENT_SECONDS = 5.0  # without a heartbeat: named
STUCK_SECONDS = 8.0  # with a step in flight and no exchange anywhere: named


def comm_timeout() -> float:
    """Return the seconds after which an exchange gives up."""
    return float(os.environ.get("V4_ASCEND_COMM_TIMEOUT", "60"))


@dataclass
class RankState:
    """What the front knows of a rank."""

    pid: int
    loaded: int = 0
    total: int = 0
    resident: int = 0
    n_graphs: int = 0
    is_ready: bool = False
    heard: float = 0.0
    moved: float = 0.0
    beat: Beat | None = None
    counts: list[list[int]] = field(default_factory=list)

    def take(self, beat: Beat, now: float) -> None:
        """Note a heartbeat, and whether anything has moved since the last one."""
        self.heard = now
        if self.beat is None or beat.n_exchanges != self.beat.n_exchanges:
            self.moved = now
        self.beat = beat


@dataclass(frozen=True)
class Verdict:
    """What is wrong with which rank; `end` means that it must be made to end first."""

    rank: int
    reason: str
    action: Literal["name", "lose", "end"]


class Watch:
    """Looks at the ranks of a deployment; times are of `time.monotonic`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        here = plan.ranks[0].host  # the front is on the first host
        self.is_local = [r.host == here for r in plan.ranks]
        # Before exchanges give up themselves: that would blame whoever waited in them.
        self._give_up_silent, self._give_up_stuck = comm_timeout() / 4, comm_timeout() / 2
        self._epoll = select.epoll()
        self._pidfds: dict[int, int] = {}  # -> rank
        self._ended: list[int] = []
        self.forget()

    def forget(self) -> None:
        """Start anew, with no rank known."""
        self.ranks: dict[int, RankState] = {}
        self._failures: list[tuple[int, str, float]] = []
        for fd in self._pidfds:
            os.close(fd)  # and epoll forgets it
        self._pidfds, self._ended = {}, []

    def met(self, rank: int, pid: int) -> None:
        """Note that a rank is there."""
        self.ranks[rank] = RankState(pid)
        if self.is_local[rank]:
            with suppress(OSError):  # gone already, or Linux before 5.3: is_alive tells
                fd = os.pidfd_open(pid)
                self._pidfds[fd] = rank
                self._epoll.register(fd, select.EPOLLIN)

    def _dead(self) -> list[int]:
        """Return local ranks whose process ended, in that order.

        Where one ends torchrun soon ends all others, maybe before we look; epoll's queue is in
        the order of what happened. Without it those silent for longest come first.
        """
        for fd, _ in self._epoll.poll(0):
            self._ended.append(self._pidfds.pop(fd))
            os.close(fd)
        unseen = [r for r in self.ranks if self.is_local[r] and r not in self._ended]
        gone = [r for r in unseen if not is_alive(self.ranks[r].pid)]
        return self._ended + sorted(gone, key=lambda r: self.ranks[r].heard)

    def failed(self, rank: int, reason: str, now: float) -> None:
        """Note that a rank says it cannot go on."""
        self._failures.append((rank, reason, now))

    def look(self, now: float, step: int | None, sent: float) -> Verdict | None:
        """Judge, given the oldest step in flight and when it was sent."""
        failed = {rank for rank, _, _ in self._failures}
        others = {r: s for r, s in self.ranks.items() if r not in failed}
        if dead := [r for r in self._dead() if r in others]:
            return Verdict(dead[0], f"ended (pid {self.ranks[dead[0]].pid})", "lose")
        if self._failures:
            return self._blamed(now, others)
        silent = [r for r, s in others.items() if s.heard and now - s.heard > SILENT_SECONDS]
        if silent:
            r = min(silent, key=lambda r: self.ranks[r].heard)
            seconds = now - self.ranks[r].heard
            reason = f"has not answered for {seconds:.0f} s (pid {self.ranks[r].pid})"
            return Verdict(r, reason, "end" if seconds > self._give_up_silent else "name")
        return self._stuck(now, step, sent) if step is not None else None

    def _blamed(self, now: float, others: dict[int, RankState]) -> Verdict | None:
        """Of ranks that failed and those that fell silent before, choose the cause."""
        rank, reason, when = self._failures[0]
        if now - when < BLAME_SECONDS[all(self.is_local)]:
            return None
        quiet = [r for r, s in others.items() if s.heard and now - s.heard > QUIET_SECONDS]
        if quiet:
            first = min(quiet, key=lambda r: self.ranks[r].heard)
            seconds = now - self.ranks[first].heard
            return Verdict(
                first, f"no word for {seconds:.0f} s; rank {rank} failed: {reason}", "lose"
            )
        return Verdict(rank, f"failed: {reason}", "lose")

    def _stuck(self, now: float, step: int, sent: float) -> Verdict | None:
        """Of ranks that wait for each other, name the one that waits for nobody, or is behind."""
        beats = {rank: r.beat for rank, r in self.ranks.items() if r.beat is not None}
        if len(beats) < 2:
            return None
        seconds = now - max(sent, max(self.ranks[r].moved for r in beats))
        if seconds < STUCK_SECONDS:
            return None
        rank = min(beats, key=lambda r: (beats[r].waiting is not None, beats[r].n_exchanges))
        others = next((b.waiting for r, b in beats.items() if r != rank and b.waiting), "nothing")
        reason = f"has kept step {step} for {seconds:.0f} s; others are in {others}"
        return Verdict(rank, reason, "end" if seconds > self._give_up_stuck else "name")

    def name(self, rank: int) -> str:
        """Say which rank it is, and what it holds."""
        return rank_name(self._plan, rank)

    def rows(self) -> list[dict[str, object]]:
        """Say of each rank here what it holds, how far it is, and what it waits for."""
        rows: list[dict[str, object]] = []
        for rank, r in sorted(self.ranks.items()):
            beat = r.beat or Beat(0, 0, None)
            rows.append(
                {
                    "rank": rank,
                    "what": self.name(rank),
                    "pid": r.pid,
                    "is_ready": r.is_ready,
                    "loaded_bytes": r.loaded,
                    "resident_bytes": r.resident,
                    "step": beat.step,
                    "n_exchanges": beat.n_exchanges,
                    "waiting": beat.waiting,
                    "bytes_sent": beat.bytes_sent,
                    "waited_s": beat.waited_s,
                }
            )
        return rows

    def flight(self, now: float) -> Iterator[str]:
        """Say of every rank what it was doing, for who asks why afterwards."""
        for rank, r in sorted(self.ranks.items()):
            beat = r.beat or Beat(0, 0, None)
            heard = f"heard {now - r.heard:.1f} s ago" if r.heard else "never heard"
            waiting = beat.waiting or "in no exchange"
            last = f"last operator {beat.operator}, " if beat.operator else ""
            if beat.dispatch is not None:
                rows, choices = (list(shape) for shape in beat.dispatch)
                last += f"last dispatch of rows {rows} with choices {choices}, "
            yield (
                f"{self.name(rank)}: step {beat.step}, {beat.n_exchanges} exchanges, {waiting}, "
                f"{last}{heard}, pid {r.pid}"
            )
