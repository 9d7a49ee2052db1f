"""Kill `shard` at random operations and go on: ``python shard_drill.py CHECKPOINT PLAN FOLDER N``.

Run by tests, in a process without torch, since it forks. A kill is a SIGKILL in front of the n-th
call that writes, syncs, opens, links, renames or removes; of a write, half is done. Prints the
points whose folder was not, in the end, byte for byte that of a run without kills.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from v4_ascend.checkpoint import rank_files
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.supernode.plan import Plan

CALLS = ("write", "pwrite", "fsync", "open", "link", "replace", "unlink", "mkdir")


def count_calls(at):
    """Count the calls of this process; at the `at`-th, die."""
    seen = [0]

    def counted(name, real):
        def call(*args, **kwargs):
            seen[0] += 1
            if seen[0] == at:
                if name in ("write", "pwrite"):
                    real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        # Who is killed loses nothing the system was given: no need to wait for the disk here.
        real = (lambda fd: None) if name == "fsync" else getattr(os, name)
        setattr(os, name, counted(name, real))
    return seen


def in_child(work, at):
    """Do the work in a child; return its calls, or None if it was killed at one."""
    begin, end = os.pipe()
    if (child := os.fork()) == 0:
        seen = count_calls(at)
        work()
        n = seen[0]
        os.write(end, str(n).encode())
        os._exit(0)
    os.close(end)
    with os.fdopen(begin) as f:
        text = f.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    assert status == 0
    return int(text)


def shard(checkpoint, plan, out, link, workers, at=None):
    def work():
        job = Sharding(CheckpointFolder(checkpoint), Plan.read(plan), is_linked=link)
        job.run(out, resume=True, workers=workers)

    return in_child(work, at)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def main(checkpoint, plan, folder, n_points):
    rank_files.MAX_FILE_BYTES = 1_000_000  # several files for a rank
    rng, failed = random.Random(n_points), []
    for link in (False, True):
        whole = folder / f"whole-{link}"
        n_calls = shard(checkpoint, plan, whole, link, workers=1)
        want = content(whole)
        for point in range(n_points // 2):
            out, at = folder / "out", rng.randint(1, n_calls)
            n_kills = 0
            while shard(checkpoint, plan, out, link, workers=1 + point % 2, at=at) is None:
                n_kills += 1
                at = rng.randint(1, n_calls) if n_kills < 3 else None
            if content(out) != want or not n_kills:
                failed.append([link, point, n_kills])
            shutil.rmtree(out)
    json.dump({"failed": failed, "calls": n_calls, "torch": "torch" in sys.modules}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
