"""A tiny call of every operator on one device, in a process that may hang, and the judgement."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import msgspec

from v4_ascend.deploy.doctor.facts import Probe, Probed
from v4_ascend.deploy.doctor.finding import Finding, Host

LAST_LINES = 3


def run_probe(backend: str, timeout_s: float) -> Probe:
    """Try a backend's operators in a process of their own, which is killed when time is up."""
    command = [sys.executable, "-m", "v4_ascend.deploy.doctor.probe", backend]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        lines, problem = done.stdout, ""
        if done.returncode:
            last = done.stderr.strip().splitlines()[-LAST_LINES:]
            problem = f"ended with exit code {done.returncode}: {' / '.join(last)}"
    except subprocess.TimeoutExpired as e:
        lines = e.stdout.decode(errors="replace") if isinstance(e.stdout, bytes) else ""
        problem = f"did not return in {timeout_s:g} s"
    return read_probe(backend, lines, problem)


def read_probe(backend: str, lines: str, problem: str) -> Probe:
    """Read the lines of `probe`: ``> op`` before a call, a `Probed` in JSON after it."""
    results, at = [], ""
    for line in lines.splitlines():
        if line.startswith("> "):
            at = line[2:]
        elif line.startswith("{"):
            try:
                results.append(msgspec.json.decode(line, type=Probed))
            except msgspec.DecodeError:
                break  # cut when it was killed: `at` is still the call
            at = ""
    return Probe(backend, tuple(results), at, problem)


def tried(host: Host) -> Iterator[Finding]:
    """Every operator V4 needs gives the reference's answer on this device."""
    probe = host.facts.probe
    if probe is None:
        return
    again = f"v4-ascend verify --backend {probe.backend}"
    if probe.problem:
        where = f"operator {probe.at} " if probe.at else "the operators' process "
        yield host.says(
            "blocker",
            "operators.run",
            f"{probe.backend}: {where}{probe.problem}",
            value=probe.at,
            expected="an answer",
            next_step=f"{again} --op {probe.at}" if probe.at else again,
        )
    for r in probe.results:
        what = f"{probe.backend}: {r.op} {r.outcome}: {r.why}"
        if r.outcome == "failed":
            yield host.says(
                "blocker",
                "operators.answers",
                what,
                value=r.op,
                expected="the reference's answer within its tolerance",
                next_step=f"{again} --op {r.op}",
            )
        elif r.outcome != "passed":
            yield host.says(
                "warning",
                "operators.kernels",
                what,
                value=r.op,
                expected="a kernel, or runtime.fallback: reference",
                next_step=f"v4-ascend ops --backend {probe.backend}",
            )
    passed = sum(r.outcome == "passed" for r in probe.results)
    if passed:
        yield host.says(
            "ok",
            "operators.answers",
            f"{passed} operators of {probe.backend} answer as the references do",
        )


CHECKS = (tried,)
