"""How fast `shard` is against `cp` of the bytes it wrote, in turns on one disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.plan import Plan


@dataclass(frozen=True, kw_only=True)
class CopySpeed:
    """Bytes written, and the seconds of the best round of each.

    `cp` returns with bytes in memory that are not on the disk yet; `cp_synced` waits for them, as
    `shard` does.
    """

    nbytes: int
    shard: float
    cp: float
    cp_synced: float


def copy_speed(
    folder: CheckpointFolder,
    plan: Plan,
    scratch: Path,
    *,
    rounds: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> CopySpeed:
    """Shard into a new folder below `scratch`, copy that folder, remove both, in turns.

    Raises:
        ConfigError: `scratch` is no folder.
        ShardError: it cannot be written there, or has no room for it.
    """
    if not scratch.is_dir():
        raise ConfigError("--scratch", f"{scratch} is no folder")
    sharded, copied, synced = [], [], []
    nbytes = 0
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=scratch) as work:
            out, copy = Path(work) / "shard", Path(work) / "cp"
            os.sync()
            begun = time.perf_counter()
            Sharding(folder, plan).run(out, workers=workers)
            sharded.append(time.perf_counter() - begun)
            nbytes = sum(f.stat().st_size for f in out.iterdir())
            os.sync()
            begun = time.perf_counter()
            subprocess.run(["cp", "-r", "--reflink=never", out, copy], check=True)
            copied.append(time.perf_counter() - begun)
            _sync(copy)
            synced.append(time.perf_counter() - begun)
            shutil.rmtree(copy)
        progress(number + 1, rounds)
    return CopySpeed(nbytes=nbytes, shard=min(sharded), cp=min(copied), cp_synced=min(synced))


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
