"""Every legal layout of up to N ranks against one process: ``python all_layouts.py [N [KERNELS]]``.

Logits, bytes read, kept and sent are compared. KERNELS is reference, or fast, which exchanges rows
beyond three ranks instead of gathering all. The tests run those of `layouts.LAYOUTS`, which have
every pair of kinds; this takes half an hour.
"""

import sys
import tempfile
import time
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from layouts import LAYOUTS, make_plan, write_tiny  # noqa: E402
from parallel_plans import run_ranks  # noqa: E402
from test_parallel import check  # noqa: E402

from v4_ascend.config.model import ModelConfig  # noqa: E402
from v4_ascend.errors import V4AscendError  # noqa: E402
from v4_ascend.supernode.holdings import holdings  # noqa: E402

SIZES = (1, 2, 4, 8)
BATCH = 12  # layouts of one set of processes


def legal(checkpoint, world, kernels="reference"):
    """Yield name and plan of every layout of `world` ranks that the model allows."""
    config = ModelConfig.read(checkpoint)
    for pp, dp, cp, tp, ep in product((*SIZES, 3, 6), SIZES, SIZES, SIZES, SIZES):
        for dsa in (False, True) if tp > 1 else (False,):
            sizes = {"pp_size": pp, "dp_size": dp, "cp_size": cp, "tp_size": tp, "ep_size": ep}
            layout = {k: v for k, v in (sizes | {"dsa_cp": dsa}).items() if v is True or v > 1}
            if pp * dp * cp * tp != world or dp * cp * tp % ep or pp > config.n_layers:
                continue
            try:
                plan = make_plan(checkpoint, layout, kernels=kernels)
                for rank in plan.ranks:
                    holdings(config, plan, rank)
            except (ValueError, V4AscendError):
                continue  # TP does not divide what it splits
            yield "-".join(f"{k.partition('_')[0]}{v}" for k, v in layout.items()) or "one", plan


def main(most="8", kernels="reference"):
    failed, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny(Path(folder) / "checkpoint")
        for world in range(2, int(most) + 1):
            plans = list(legal(checkpoint, world, kernels))
            for first in range(0, len(plans), BATCH):
                some, began = dict(plans[first : first + BATCH]), time.monotonic()
                LAYOUTS.update((n, p.parallel.model_dump(exclude_defaults=True))
                               for n, p in some.items())  # fmt: skip
                out = Path(folder) / f"{world}-{first}"
                out.mkdir()
                try:
                    check(out, checkpoint, some, run_ranks(out, some, world, timeout=900))
                    verdict = "equal to one process"
                except AssertionError as e:
                    verdict = f"FAILED: {e}"
                    failed += some
                count += len(some)
                seconds = time.monotonic() - began
                sys.stdout.write(f"{world} ranks, {seconds:.0f} s: {' '.join(some)}: {verdict}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{count} layouts, {len(failed)} in batches that failed\n")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
