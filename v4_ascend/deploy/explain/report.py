"""A verdict in words: what and where, why, what to do; then the evidence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from v4_ascend.deploy.explain.entries import Entry
from v4_ascend.deploy.explain.findings import Finding, Verdict, ranks_heard
from v4_ascend.supernode.plan import Plan, rank_name

LINE_CHARS = 300  # of a log line that is shown
MAX_NAMED = 8


def entry_lines(entry: Entry) -> Iterator[str]:
    """Say what a code means."""
    name = f" ({entry.symbol})" if entry.symbol else ""
    kind = ", a consequence" if entry.is_consequence else ", a wrapper" if entry.is_wrapper else ""
    yield f"{entry.id}{name}: {entry.title} [{entry.layer}{kind}]"
    yield from _advice(entry)
    yield f"source: {entry.source} ({entry.evidence}, {entry.date})"


def _advice(entry: Entry) -> Iterator[str]:
    yield f"why: {entry.cause}"
    for number, step in enumerate(entry.next):
        yield f"{'then' if number else 'do'}: {step}"


def verdict_lines(verdict: Verdict, plan: Plan | None, untimed: list[str]) -> Iterator[str]:
    """Say what the logs show: three lines to read first, then what they rest on."""
    first = verdict.first
    if first is None:
        yield "no error found in these logs"
        return
    if verdict.is_told_to_end:
        yield "no fault in these logs: processes were told to end (signal 15), as down does"
        yield f"line: {_line(first)}"
        return
    entry = first.entry
    what = f"{entry.id}, {entry.title}" if entry else "unknown error"
    yield f"{_who(first, plan)}: {what}{_when(first)}"
    if entry:
        yield from _advice(entry)
    else:
        yield "why: unknown; no entry of v4-ascend explain-error --list fits this line"
        yield "do: read the log from that line on; v4-ascend support-bundle packs what others need"
    yield f"line: {_line(first)}"
    if entry:
        yield f"source: {entry.source} ({entry.evidence}, {entry.date})"
    yield from _after(verdict)
    yield from _doubts(verdict, plan, untimed)


def _who(f: Finding, plan: Plan | None) -> str:
    rank = f.place.rank
    if rank is None:
        return f"{f.place.file}, process {f.place.pid}" if f.place.pid else f.place.file
    known = plan is not None and rank < len(plan.ranks)
    return rank_name(plan, rank) if plan is not None and known else f"rank {rank}"


def _when(f: Finding) -> str:
    if f.at is None:
        return ", time unknown"
    about = "" if f.line.is_own else "after "
    is_to_second = f.line.stamp is not None and f.line.stamp.is_to_second
    exact = "seconds" if is_to_second else "milliseconds"
    return f", {about}{f.at.isoformat(sep=' ', timespec=exact)}"


def _line(f: Finding) -> str:
    text = f.line.text
    cut = text if len(text) <= LINE_CHARS else text[:LINE_CHARS] + " ..."
    return f"{f.place.file}:{f.line.number}: {cut}"


def _after(verdict: Verdict) -> Iterator[str]:
    """Say what else there is, an error a line."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for f in verdict.rest:
        groups[f.entry.id if f.entry else "unknown"].append(f)
    for name, found in groups.items():
        ranks = sorted(ranks_heard(found))
        shown = ", ".join(map(str, ranks[:MAX_NAMED])) + (" ..." if len(ranks) > MAX_NAMED else "")
        where = f" on rank {shown}" if ranks else ""
        f = found[0]
        kind = " (a consequence)" if f.entry and f.entry.is_consequence else ""
        n_lines = sum(g.count for g in found)
        lines = f"{n_lines} lines" if n_lines > 1 else "1 line"
        yield f"also: {name}{kind}{where}{_when(f)}, {lines}, first {f.place.file}:{f.line.number}"


def _doubts(verdict: Verdict, plan: Plan | None, untimed: list[str]) -> Iterator[str]:
    """Say what the order rests on, and whose word is missing."""
    findings = [f for f in (verdict.first, *verdict.rest) if f is not None]
    heard = ranks_heard(findings)
    if verdict.only_consequences:
        silent = [r.rank for r in plan.ranks if r.rank not in heard] if plan else []
        shown = ", ".join(map(str, silent[:MAX_NAMED])) + (" ..." if len(silent) > 8 else "")
        yield "note: only consequences are here; what they follow from is in no log given" + (
            f", or on a rank without an error: {shown}" if silent else ""
        )
    for file in untimed:
        yield f"note: {file} has no times; its lines come last, in their own order"
    if len({f.place.file for f in findings}) > 1:
        yield "note: times without a zone are taken as they stand, as if all clocks agreed"


def entry_facts(entry: Entry) -> dict[str, object]:
    """Return an entry for scripts."""
    return entry.model_dump(exclude={"needles", "pattern"})


def verdict_facts(verdict: Verdict, plan: Plan | None, untimed: list[str]) -> dict[str, object]:
    """Return a verdict for scripts."""
    first = verdict.first
    explained = first is not None and first.entry is not None
    result = "explained" if explained else "unknown" if first else "no error"
    return {
        "result": "told to end" if verdict.is_told_to_end else result,
        "first": first and _finding_facts(first, plan),
        "rest": [_finding_facts(f, plan) for f in verdict.rest],
        "only_consequences": verdict.only_consequences,
        "files_without_time": untimed,
    }


def _finding_facts(f: Finding, plan: Plan | None) -> dict[str, object]:
    return {
        "error": entry_facts(f.entry) if f.entry else None,
        "rank": f.place.rank,
        "who": _who(f, plan),
        "pid": f.place.pid,
        "file": f.place.file,
        "line": f.line.number,
        "text": f.line.text,
        "time": f.at.isoformat() if f.at else None,
        "has_own_time": f.line.is_own,
        "n_lines": f.count,
    }
