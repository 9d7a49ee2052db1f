"""Which rank wrote a log line, as far as the line or its file says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from v4_ascend.supernode.plan import Plan

# What names a rank of the whole deployment: ours, torch, vLLM, torch_npu, torchrun's summary.
_RANKS = tuple(
    re.compile(p)
    for p in (
        r"\brank (\d+) \(stage",
        r"\[[Rr]ank ?(\d+)\]",
        r"\bWorker\w*_EP(\d+)\b",
        r"\w*Worker rank=(\d+) pid=",
        r"\bRankID:(\d+)",
        r"^\[default\d+\]:.*\brank (\d+)\b",
        r"^\s*rank\s+: (\d+) \(local_rank",
        r"^(?:error: )?rank (\d+): ",
    )
)
_ALONE = re.compile(r"\bWorker(?:_TP| TP)(\d+)(?![\d_])")  # without DP it is the rank
_LOCAL = re.compile(r"^\[(\d+)\]: ")  # torchrun's prefix, see `deploy.torchrun`
_FAILED = re.compile(r"\blocal_rank: (\d+) \(pid: (\d+)\)")  # torchrun of one that ended
_PID = re.compile(
    r"\bpid=(\d+)|\bPID: ?(\d+)|\[ERROR\] ?[A-Z]+\((\d+),|\bKill(?:ed)? process (\d+)"
)
_OF_FILE = re.compile(r"(?:^|[-_./])rank[-_.]?(\d+)(?:[-_./]|$)")
_OF_TORCHRUN = re.compile(r"attempt_\d+/(\d+)/std(?:out|err)\.log$")


@dataclass(frozen=True, slots=True)
class Place:
    """Who wrote a line; None is what neither it nor its file says."""

    file: str
    rank: int | None
    pid: int | None


def place_of(text: str, file: str, plan: Plan | None) -> Place:
    """Return who wrote a line; a host's own numbers are looked up in the plan."""
    pid = next((int(g) for g in m.groups() if g), None) if (m := _PID.search(text)) else None
    if failed := _FAILED.search(text):
        return Place(file, _of_host(int(failed[1]), file, plan), int(failed[2]))
    # Of others' ranks a line may speak too: the prefix is the writer's.
    if local := _LOCAL.match(text):
        return Place(file, _of_host(int(local[1]), file, plan), pid)
    for regex in _RANKS:
        if found := regex.search(text):
            return Place(file, int(found[1]), pid)
    if found := _ALONE.search(text):
        return Place(file, int(found[1]), pid)
    if found := _OF_TORCHRUN.search(file):
        return Place(file, _of_host(int(found[1]), file, plan), pid)
    if found := _OF_FILE.search(file):
        return Place(file, int(found[1]), pid)
    return Place(file, None, pid)


def _of_host(local: int, file: str, plan: Plan | None) -> int | None:
    """Return the rank of a host's process; `ranks-HOST.log` says which host, `ranks.log` the first.

    Without a plan it is known on one host alone.
    """
    kind, _, host = PurePath(file).stem.partition("-")
    if plan is None:
        return None if kind == "ranks" and host else local
    wanted = host if kind == "ranks" and host else plan.ranks[0].host
    ranks = [r.rank for r in plan.ranks if r.host == wanted]
    return ranks[local] if local < len(ranks) else None
