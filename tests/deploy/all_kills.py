"""Kill what replaces a deployment with -9, before and after each of its steps, one after the other.

python tests/deploy/all_kills.py     # about 4 s each; tests run a sample of it
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_replacement import POINTS, Bench, killed_at


def main():
    for how, point in POINTS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_STATE_HOME"] = f"{folder}/state"
            bench = Bench(Path(folder))
            try:
                killed_at(bench, how, point)
            finally:
                bench.end()
        sys.stdout.write(f"{how}, killed {point}: what was left was understood\n")
    sys.stdout.write(f"{len(POINTS)} kills\n")


if __name__ == "__main__":
    main()
