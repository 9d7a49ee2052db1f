"""The topologies golden plans are made of, and how: ``python golden_plans.py`` writes the file."""

import json
import sys
from pathlib import Path

from v4_ascend.config.topology import load_topology
from v4_ascend.supernode.planning import find_model, layout_name, plan_pools

FILE = Path(__file__).parents[1] / "data" / "golden_plans.json"


def cluster(device, n_hosts, per_host, fabric="{}", n_supernodes=1):
    nodes = ", ".join(
        f"{{name: sp{i}, host_count: {n_hosts}, devices_per_host: {per_host}}}"
        for i in range(n_supernodes)
    )
    return [
        f"cluster.device={device}",
        f"cluster.supernodes=[{nodes}]",
        f"cluster.fabric={fabric}",
    ]


DT = "ascend-950dt-96"
PRO, FLASH = ["model.name=v4-pro"], ["model.name=v4-flash"]
CASES = {
    "pro-16x950dt": [*PRO, *cluster(DT, 2, 8)],
    "pro-64x950dt": [*PRO, *cluster(DT, 8, 8)],
    "pro-128x950dt": [*PRO, *cluster(DT, 16, 8)],
    "pro-384x950dt": [*PRO, *cluster(DT, 48, 8)],
    "pro-8192x950dt": [*PRO, *cluster(DT, 1024, 8)],
    "pro-2xa3": [*PRO, *cluster("ascend-a3-64", 2, 16)],
    "pro-4xa2": [*PRO, *cluster("ascend-a2-64", 4, 8)],
    "flash-1xa2": [*FLASH, *cluster("ascend-a2-64", 1, 8)],
    "flash-1xa3": [*FLASH, *cluster("ascend-a3-64", 1, 16)],
    "flash-8x950pr": [*FLASH, *cluster("ascend-950pr-128", 1, 8)],
    "flash-8xh200": [*FLASH, *cluster("nvidia-h200", 1, 8)],
    "tiny-4-processes": [
        "model.name=v4-tiny",
        "serve.max_model_len=2048",
        "serve.concurrency=4",
        "serve.slo={}",
        *cluster("cpu", 1, 4),
    ],
    "pro-8x910b4": [*PRO, *cluster("ascend-910b4-32", 1, 8)],
}


def plan(*overrides):
    topology = load_topology("supernode", overrides)
    return plan_pools(topology, find_model(topology))


def facts(name):
    """What a golden plan pins: the layout, who holds what, and the bytes."""
    (pool,) = plan(*CASES[name])
    c = pool.chosen
    found = {
        "judged": pool.found.n_judged,
        "legal": len(pool.found.choices),
        "refused": {r.rule.id: r.count for r in pool.found.rejected},
    }
    if c is None:
        return found | {"layout": None}
    return found | {
        "layout": layout_name(c.parallel),
        "runners_up": [layout_name(x.parallel) for x in pool.found.choices[1:5]],
        "format": pool.search.serving.weight_format,
        "batch": c.batch,
        "layers": [list(r) for r in c.layers],
        "rank_bytes": [m.fixed for m in c.memory],
        "full_requests": c.n_full(pool.search.serving.max_model_len),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: facts(name) for name in CASES}, indent=1) + "\n")
    sys.stdout.write(FILE.read_text())
