"""Kill `convert` at random operations and go on: ``python convert_drill.py CHECKPOINT FOLDER N``.

As shard_drill.py; it forks before torch has made threads. Prints the points whose folder was not,
in the end, byte for byte that of a run without kills.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import shard_drill

from v4_ascend.checkpoint.convert import Conversion
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.recoding import Recoding
from v4_ascend.config.precision import recipe_for


def convert(checkpoint, out, format, workers, at=None):
    def work():
        folder = CheckpointFolder(checkpoint)
        job = Conversion(folder, Recoding(folder, format, recipe_for(format, None, None)))
        job.run(out, resume=True, workers=workers)

    return shard_drill.in_child(work, at)


def main(checkpoint, folder, n_points):
    rng, failed, n_all = random.Random(n_points), [], 0
    for format in ("fp8", "w4a8"):
        whole = folder / f"whole-{format}"
        n_calls = convert(checkpoint, whole, format, workers=1)
        want = shard_drill.content(whole)
        for point in range(n_points // 2):
            out, at, n_kills = folder / "out", rng.randint(1, n_calls), 0
            while convert(checkpoint, out, format, workers=1 + point % 2, at=at) is None:
                n_kills += 1
                at = rng.randint(1, n_calls) if n_kills < 3 else None
            n_all += n_kills
            if shard_drill.content(out) != want or not n_kills:
                failed.append([format, point, n_kills])
            shutil.rmtree(out)
    json.dump({"failed": failed, "kills": n_all}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
