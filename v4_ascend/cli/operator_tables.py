"""What `ops` and `verify` print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.table import Table

from v4_ascend.backends import Backend
from v4_ascend.cli.console import new_console
from v4_ascend.runtime.capability import MODELS, Capability
from v4_ascend.runtime.verify import Result

Found = Sequence[tuple[Backend, str | None, list[Capability]]]
MAX_FAILURES = 20
STYLES = {"passed": "green", "failed": "red", "refused": "yellow"}


def _title(backend: Backend, chip: str | None) -> str:
    return backend.name if chip is None else f"{backend.name} {chip}"


def print_overview(found: Found) -> None:
    """Print whose kernel each operator would take, a column per device."""
    console = new_console()
    table = Table("op", *(_title(b, chip) for b, chip, _ in found))
    for rows in zip(*(capability for _, _, capability in found), strict=True):
        table.add_row(rows[0].op, *(_providers(c) for c in rows))
    console.print(table)
    for backend in {b.name: b for b, _, _ in found}.values():
        why = backend.why_unavailable()
        console.print(f"{backend.name}: {'can run here' if why is None else f'not here: {why}'}")
    console.print("each cell: whose kernel would run at Flash and Pro shapes, in bf16;")
    console.print("* not with every weight or cache format")
    console.print("reasons and kernel names: v4-ascend ops --backend NAME")


def _providers(c: Capability) -> str:
    if c.missing is not None:
        return "missing"
    names = list(dict.fromkeys(choice.provider for choice in c.choices if choice.provider))
    mark = "" if all(choice.provider for choice in c.choices) else "*"
    return ", ".join(names) + mark if names else "refused"


def print_backend(backend: Backend, chip: str | None, table: list[Capability]) -> None:
    """Print every operator's kernel, and each reason against one."""
    console = new_console()
    why = backend.why_unavailable()
    state = "can run here" if why is None else f"not here: {why}"
    console.print(f"{_title(backend, chip)}: {state}", style="bold")
    out = Table("op", "kernel", "by", "for")
    for c in table:
        if c.missing is not None:
            out.add_row(c.op, "missing", "", c.missing)
        for kernel, choices in c.kernels.items():
            cases = ", ".join(choice.case for choice in choices)
            models = [m for m in MODELS if any(m in choice.models for choice in choices)]
            what = "all" if len(choices) == len(c.choices) and len(models) == 2 else cases
            if kernel:
                out.add_row(c.op, kernel, choices[0].provider, what)
            else:
                out.add_row(c.op, "none accepts", "", what)
    console.print(out)
    reasons = {(c.op, r) for c in table for choice in c.choices for r in choice.refusals}
    for op, reason in sorted(reasons):
        console.print(f"{op}: {reason}")


def print_results(results: Mapping[str, list[Result]]) -> None:
    """Print a row per kernel, then failures."""
    console = new_console()
    table = Table("op", "kernel", "by", "proof", "passed", "failed", "refused", "worst", "seconds")
    failures = []
    for backend, rows in results.items():
        by_kernel: dict[tuple[str, str], list[Result]] = {}
        for r in rows:
            by_kernel.setdefault((r.op, r.kernel), []).append(r)
        for (op, kernel), of_kernel in by_kernel.items():
            counts = Counter(r.outcome for r in of_kernel)
            failures += [r for r in of_kernel if r.outcome == "failed"]
            first = of_kernel[0]
            table.add_row(
                op,
                f"{backend} {kernel}",
                first.provider,
                first.proof,
                *(str(counts[o] or "") for o in ("passed", "failed", "refused")),
                f"{max(r.used for r in of_kernel):.0%}",
                f"{sum(r.seconds for r in of_kernel):.2f}",
                style=STYLES["failed" if counts["failed"] else "passed"]
                if counts["passed"] or counts["failed"]
                else STYLES["refused"],
            )
    console.print(table)
    console.print("worst: the largest part of its tolerance an element used; seconds: first calls")
    for r in failures[:MAX_FAILURES]:
        console.print(f"{r.op} {r.kernel} {r.case}: {r.why}", style=STYLES["failed"])
    if (more := len(failures) - MAX_FAILURES) > 0:
        console.print(f"... and {more} more; --report DIR has them all", style=STYLES["failed"])
    total = Counter(r.outcome for rows in results.values() for r in rows)
    console.print(", ".join(f"{total[o]} {o}" for o in ("passed", "failed", "refused")))
