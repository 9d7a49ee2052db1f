"""How fast `convert` is: bytes of the checkpoint per second, from disk to disk.

The arithmetic of DeepSeek's own converter (inference/convert.py, ``--expert-dtype fp8``), written
again as it is there, one expert after another in memory, is timed beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch

from v4_ascend.checkpoint.convert import Conversion
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.reader import read_tensor
from v4_ascend.checkpoint.recoding import Recoding
from v4_ascend.config.precision import Format, recipe_for
from v4_ascend.errors import ConfigError
from v4_ascend.ops.formats import FP8, fp4_value, scale_to_float, unpack_fp4

SAMPLE = 16  # expert weights the plain arithmetic is timed on
BLOCK, GROUP = 128, 32


def convert_speed(
    folder: CheckpointFolder,
    formats: Sequence[Format],
    scratch: Path,
    *,
    rounds: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Return bytes per second of the best round of each format, and of the plain FP4 to FP8.

    Raises:
        ConfigError: `scratch` is no folder.
        ShardError: it cannot be written there, or has no room for it.
    """
    if not scratch.is_dir():
        raise ConfigError("--scratch", f"{scratch} is no folder")
    nbytes = sum(h.nbytes for h in folder.headers.values())
    best: dict[str, float] = {}
    steps = rounds * (len(formats) + 1)
    for number in range(steps):
        what = (*formats, "plain")[number % (len(formats) + 1)]
        rate = (
            _plain_rate(folder)
            if what == "plain"
            else nbytes / _seconds(folder, formats[number % (len(formats) + 1)], scratch, workers)
        )
        if rate:
            best[what] = max(best.get(what, 0.0), rate)
        progress(number + 1, steps)
    return best


def _seconds(folder: CheckpointFolder, format: Format, scratch: Path, workers: int) -> float:
    job = Conversion(folder, Recoding(folder, format, recipe_for(format, None, None)))
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        os.sync()
        begun = time.perf_counter()
        job.run(Path(work) / "out", workers=workers)
        return time.perf_counter() - begun


def _plain_rate(folder: CheckpointFolder) -> float | None:
    """Time FP4 to FP8 on a few experts; None where there is no FP4."""
    names = (n for n, h in folder.headers.items() if h.dtype == "I8")
    sample = [
        (read_tensor(folder.headers[n]), read_tensor(folder.headers[n[: -len("weight")] + "scale"]))
        for n in islice(names, SAMPLE)
    ]
    if not sample:
        return None
    begun = time.perf_counter()
    for weight, scale in sample:
        _widen(weight, scale)
    seconds = time.perf_counter() - begun
    return sum(w.nbytes + s.nbytes for w, s in sample) / seconds


def _widen(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Look values up, scale them to their block's and round: what the official script does."""
    value = fp4_value(unpack_fp4(weight))
    rows, columns = value.shape
    tiles = value.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).transpose(1, 2)
    factor = scale_to_float(scale).view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK // GROUP)
    factor = factor.transpose(1, 2)
    largest = factor.amax(dim=(-1, -2), keepdim=True) / 2**6
    wide = (factor / largest).repeat_interleave(GROUP, -1)
    return (tiles * wide).transpose(1, 2).reshape(rows, columns).to(FP8)
