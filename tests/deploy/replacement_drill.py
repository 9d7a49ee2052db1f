"""A deployment of stand-in processes that is started, replaced, and killed where it is told.

python replacement_drill.py NAME HOW PORT CHECKPOINT CONCURRENCY [KILL]

HOW is ``start``, ``shadow`` or ``downtime``. KILL is ``before:STEP`` or ``after:STEP`` of STEPS:
there the process kills itself with -9, as nobody catches it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from explain_plan import two_hosts

from v4_ascend.config.topology import ParallelConfig
from v4_ascend.deploy.deployment import Deployment
from v4_ascend.deploy.replacement import (
    Shadow,
    Successor,
    find_running,
    replace_stopped,
    wait_until_alone,
)
from v4_ascend.deploy.room import Room
from v4_ascend.deploy.state import vacant
from v4_ascend.supernode.plan import Rank

# Of a shadow and of what comes after a stop; in the order they are taken.
STEPS = {
    "shadow": ("_announce", "_take_address", "_clear", "_start_front", "_wait_for_link",
               "_start_ranks", "_wait_ready", "_open", "_take_over", "_send_away"),
    "downtime": ("_announce", "_take_address", "_stop_other", "_clear", "_start_front",
                 "_wait_for_link", "_begin", "_start_ranks", "_wait_ready", "_take_over"),
}  # fmt: skip
RANKS = "while kill -0 $0 2>/dev/null; do sleep 0.1; done"  # they end with their front


def stand_ins():
    """Let deployments start our processes instead of fronts and ranks."""
    start = Deployment._start

    def instead(self, name, command, env=None, stdin=subprocess.DEVNULL, pass_fds=()):
        if name == "front":
            front = Path(__file__).with_name("stand_in_front.py")
            command = [sys.executable, str(front), *command[3:]]
        else:
            command, env = ["sh", "-c", RANKS, str(self._processes["front"].pid)], None
        return start(self, name, command, env, stdin, pass_fds)

    Deployment._start = instead


def kill_at(point, kinds):
    """Replace a step by one that kills us before or after it."""
    when, _, step = point.partition(":")

    def killed(real):
        def run(self, *args):
            result = real(self, *args) if when == "after" else None
            os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    for kind in kinds:
        if step in vars(kind):
            setattr(kind, step, killed(vars(kind)[step]))
            return
    raise SystemExit(f"no step {step}")


def plan_of(name, port, checkpoint, concurrency):
    return two_hosts(
        name=name,
        port=port,
        checkpoint=checkpoint,
        max_batch_size=concurrency,
        backend="cpu",
        parallel=ParallelConfig(),
        ranks=(Rank(rank=0, host="localhost", layers=(0, 5), experts=(0, 8)),),
    )


def main():
    name, how, port, checkpoint, concurrency, *kill = sys.argv[1:]
    plan = plan_of(name, int(port), checkpoint, int(concurrency))

    def report(line):
        sys.stderr.write(f"{name}: {line}\n")

    stand_ins()
    if kill:
        kill_at(kill[0], (Shadow if how == "shadow" else Successor, Deployment))
    if how == "start":
        Deployment(plan, report, 20.0, vacant(name)).run(20)
        return
    running = find_running(plan)
    wait_until_alone(running, 20, report)
    if how == "shadow":
        Shadow(Room(plan, True, "", True), report, 20.0, running.supervisor).run(20)
    else:
        replace_stopped(plan, report, 20.0, 20, running)


if __name__ == "__main__":
    main()
