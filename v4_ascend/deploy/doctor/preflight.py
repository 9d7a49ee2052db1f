"""Ask every host at once, and judge what they answer."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from v4_ascend.config.devices import device_profile
from v4_ascend.config.topology import Topology, is_remote
from v4_ascend.deploy.agent import passed_on
from v4_ascend.deploy.doctor import (
    devices,
    fabric,
    hccl,
    host_limits,
    network,
    operators,
    software,
    storage,
)
from v4_ascend.deploy.doctor.facts import Answer, Facts, Question
from v4_ascend.deploy.doctor.finding import AcrossCheck, Check, Expected, Finding, Host
from v4_ascend.deploy.doctor.gathering import gather
from v4_ascend.deploy.ssh import SSH
from v4_ascend.deploy.torchrun import require_first_here
from v4_ascend.errors import ConfigError, DeployError, PreflightError

HERE = "this host"
BACKENDS = {"cpu": "cpu", "cuda": "cuda", "npu": "ascend"}
LEVELS = ("blocker", "warning", "hint", "ok", "not-applicable")
QUICK_SECONDS = 20.0  # ours: npu-smi of 16 devices takes a few
MARGIN_S = 10.0  # of ssh, over what the host itself may take

CHECKS: tuple[Check, ...] = (
    *software.CHECKS,
    *devices.CHECKS,
    *network.CHECKS,
    *fabric.CHECKS,
    *hccl.CHECKS,
    *host_limits.CHECKS,
    *storage.CHECKS,
    *operators.CHECKS,
)
ACROSS: tuple[AcrossCheck, ...] = (
    *software.ACROSS,
    *network.ACROSS,
    *fabric.ACROSS,
    *storage.ACROSS,
)
Ask = Callable[[Question], Answer]


def expected_of(topology: Topology) -> dict[str, Expected]:
    """Return what a topology needs of each of its hosts, in their order.

    Raises:
        ConfigError: hosts without names cannot be asked.
    """
    cluster, found = topology.cluster, {}
    n_hosts = sum(s.n_devices // s.devices_per_host for s in cluster.supernodes)
    for node in cluster.supernodes:
        if node.hosts is None and n_hosts > 1:
            raise ConfigError(
                topology.where("cluster.supernodes"),
                f"cluster.supernodes: {node.name} has host_count; doctor needs the names, in hosts",
            )
        pool = next((p for p in cluster.pools if node.name in p.supernodes), None)
        device = pool.device if pool is not None and pool.device is not None else cluster.device
        profile = device_profile(device, topology.where("cluster.device"))
        for host in node.hosts or (HERE,):
            found[host] = Expected(
                kind=profile.kind,
                family=profile.family,
                n_devices=node.devices_per_host,
                n_ranks=cluster.n_devices,
                n_hosts=n_hosts,
                memory_utilisation=topology.serve.memory_utilisation,
                emulated=profile.emulated or topology.emulate,
                engine=topology.engine,
                supernode=node.name,
                has_topology=True,
            )
    return found


def questions_of(
    topology: Topology, expected: Mapping[str, Expected], timeout_s: float, *, probe: bool
) -> list[Question]:
    """Return what to ask each host."""
    path, hosts = topology.model.checkpoint, list(expected)
    env = passed_on()
    questions = []
    for i, (host, wanted) in enumerate(expected.items()):
        kind = "cpu" if wanted.emulated else wanted.kind
        backend = topology.runtime.backend
        question = Question(
            host=host,
            kind=kind,
            peers=tuple(h for h in hosts if h != host),
            ports=((topology.serve.host, topology.serve.port),) if i == 0 else (),
            checkpoint=None if is_remote(path) else path,
            compare=len(hosts) > 1,
            env=env if i else {},
            probe=(BACKENDS[kind] if backend == "auto" else backend) if probe else "",
            timeout_s=timeout_s,
        )
        questions.append(question)
    return questions


def ask_here(question: Question) -> Answer:
    """Answer a question in this process."""
    return Answer(question.host, gather(question))


def ask_over_ssh(question: Question) -> Answer:
    """Ask another host, by the user's own ssh configuration."""
    remote = f"{shlex.quote(sys.executable)} -m v4_ascend.deploy.doctor.host"
    sent = time.time()
    try:
        done = subprocess.run(
            [*SSH, question.host, remote],
            input=msgspec.json.encode(question) + b"\n",
            capture_output=True,
            timeout=question.timeout_s + MARGIN_S,
            check=False,
        )
    except FileNotFoundError:
        return Answer(question.host, problem="ssh is not installed here")
    except subprocess.TimeoutExpired as e:
        return Answer(question.host, problem=f"no answer over ssh in {e.timeout:g} s")
    got = time.time()
    try:
        facts = msgspec.json.decode(done.stdout, type=Facts)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = done.stderr.decode(errors="replace").strip().splitlines()
        what = said[-1] if said else "nothing"
        code = done.returncode
        return Answer(question.host, problem=f"ssh ended with exit code {code}, saying: {what}")
    # The clock was read between the two: only what lies outside of them is skew.
    skew = max(facts.clock - got, 0.0) - max(sent - facts.clock, 0.0)
    return Answer(question.host, facts, skew_s=skew)


def ask_all(questions: Sequence[Question], remote: Ask = ask_over_ssh) -> list[Answer]:
    """Ask all hosts at once; return their answers in the questions' order.

    The first one is asked here, if that is where we are: doctor is run from elsewhere too.
    """
    try:
        require_first_here([q.host for q in questions])
        first: Ask = ask_here
    except DeployError:
        first = remote
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda q: (first if q is questions[0] else remote)(q), questions))


def judge(answers: Sequence[Answer], expected: Mapping[str, Expected]) -> list[Finding]:
    """Return what the checks find, the worst first."""
    found = []
    hosts = []
    for a in answers:
        if a.facts is None:
            found.append(
                Finding(
                    "blocker",
                    a.host,
                    "network.ssh",
                    f"it could not be asked: {a.problem}",
                    a.problem,
                    "facts as JSON",
                    f"ssh -o BatchMode=yes {a.host} true",
                    "deploy starts its ranks the same way",
                )
            )
        else:
            hosts.append(Host(a.host, a.facts, expected[a.host], a.skew_s))
    found += [f for host in hosts for check in CHECKS for f in check(host)]
    found += [f for across in ACROSS for f in across(hosts)]
    return sorted(found, key=lambda f: LEVELS.index(f.level))


def look(topology: Topology) -> list[Answer]:
    """Ask every host what a quick look shows; operators are not tried."""
    return ask_all(questions_of(topology, expected_of(topology), QUICK_SECONDS, probe=False))


def require_fit(
    topology: Topology, again: str, answers: Sequence[Answer], left_out: Collection[str] = ()
) -> None:
    """Refuse to deploy what a quick look already shows to fail.

    Checks that are `left_out` say nothing here: what they find is taken by what is replaced.

    Raises:
        PreflightError: with the first blocker, its next step, and how many more there are.
    """
    found = judge(answers, expected_of(topology))
    blockers = [f for f in found if f.level == "blocker" and f.check not in left_out]
    if blockers:
        raise PreflightError(refusal(blockers, again))


def refusal(blockers: Sequence[Finding], again: str) -> str:
    """Return the error's line: the first blocker, the next step, and where the rest is listed."""
    first = blockers[0]
    line = f"{first.host}: {first.what}"
    line += f"; expected {first.expected}" if first.expected else ""
    line += f"; next: {first.next_step}" if first.next_step else ""
    return line + (f"; {len(blockers) - 1} more: {again}" if len(blockers) > 1 else "")
