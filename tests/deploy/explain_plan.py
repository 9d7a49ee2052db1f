"""A plan of two hosts with two devices each, as an error is joined to."""

from v4_ascend.config.topology import ParallelConfig
from v4_ascend.supernode.plan import Plan, Rank


def two_hosts(**changed):
    ranks = tuple(
        Rank(
            rank=r,
            host=f"host-{'ab'[r // 2]}",
            device=r % 2,
            layers=(0, 5),
            experts=(4 * (r % 2), 4 * (r % 2) + 4),
        )
        for r in range(4)
    )
    fields = {
        "name": "pair",
        "device": "ascend-a3-64",
        "backend": "ascend",
        "chip": "a3",
        "emulated": False,
        "checkpoint": "/models/v4",
        "model_name": "v4",
        "parallel": ParallelConfig(dp_size=4, ep_size=2),
        "ranks": ranks,
        "host": "127.0.0.1",
        "port": 8000,
        "max_model_len": 1024,
        "max_batch_size": 4,
        "max_chunk": 1024,
        "dtype": None,
        "quant_sim": "auto",
        "kernels": "fast",
        "fallback": "error",
        "api_keys": (),
        "requests_per_minute": None,
        "max_body_bytes": 1 << 20,
        "cors_origins": (),
    }
    return Plan(**(fields | changed))
