"""A real plan's layout with fewer ranks and a small model: to run it where its devices are not."""

from __future__ import annotations

from math import gcd

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import Cluster, Model, ParallelConfig, Supernode, Topology
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.experts import by_number
from v4_ascend.supernode.planning import PoolPlan


def shrunk(p: ParallelConfig, n_ranks: int, config: ModelConfig) -> ParallelConfig:
    """Return the layout on `n_ranks` ranks: the same kinds of groups, each smaller.

    Stages are kept as far as there are layers, then TP and CP as far as heads and output groups
    allow; DP takes what is left, and EP what divides the experts.

    Raises:
        ConfigError: nothing of this shape has so many ranks.
    """
    pp = gcd(p.pp_size, n_ranks)
    while pp > config.n_layers:
        pp //= 2
    left = n_ranks // pp
    tp = gcd(gcd(p.tp_size, left), config.o_groups)
    left //= tp
    cp = gcd(p.cp_size, left)
    dp = left // cp
    if dp > p.dp_size:
        raise ConfigError(
            "--emulate",
            f"{n_ranks} ranks are more than the plan's {p.world_size} can stand for: with pp {pp}, "
            f"cp {cp}, tp {tp} it has dp {p.dp_size}",
        )
    ep = gcd(gcd(p.ep_size, dp * cp * tp), config.n_routed_experts)
    return ParallelConfig(
        pp_size=pp, dp_size=dp, cp_size=cp, tp_size=tp, ep_size=ep, dsa_cp=p.dsa_cp and tp > 1
    )


def local_topology(
    real: Topology, pool: PoolPlan, n_ranks: int, checkpoint: str, config: ModelConfig
) -> Topology:
    """Return a topology of `n_ranks` processes of this machine in the layout of a real plan.

    Raises:
        ConfigError: as `shrunk`.
        ValueError: the pool has no layout.
    """
    if pool.chosen is None:
        raise ValueError("no legal layout")
    layout = shrunk(pool.chosen.parallel, n_ranks, config)
    here = Supernode(name="here", hosts=("localhost",), devices_per_host=n_ranks)
    length = min(real.serve.max_model_len, 2048)
    return real.model_copy(
        update={
            "cluster": Cluster(device="cpu", supernodes=(here,)),
            "model": Model(checkpoint=checkpoint, name=f"{real.model.name}-emulated"),
            "serve": real.serve.model_copy(
                update={"max_model_len": length, "concurrency": 2 * layout.dp_size}
            ),
            "layout": layout,
            "launcher": "local",
            "emulate": False,
        }
    )


def ledger(pool: PoolPlan, n_ranks: int, layout: ParallelConfig) -> list[str]:
    """Say of each local rank which rank of the real plan it stands for, and what that one holds.

    Raises:
        ValueError: the pool has no layout.
    """
    if pool.chosen is None:
        raise ValueError("no legal layout")
    c, lines = pool.chosen, []
    config, p = pool.search.config, c.parallel
    own = by_number(config.n_routed_experts, p.ep_size)
    for rank in range(n_ranks):
        stage, within = divmod(rank, layout.stage_size)
        real_stage = stage * p.pp_size // layout.pp_size
        real = real_stage * p.stage_size + within * (p.stage_size // layout.stage_size)
        experts = own[real % p.stage_size % p.ep_size]
        memory, layers = c.memory[real_stage], c.layers[real_stage]
        lines.append(
            f"rank {rank} stands for rank {real} on {pool.system.host_of(real)}: "
            f"stage {real_stage}, layers {layers[0]} to {layers[1] - 1}, experts {experts[0]} to "
            f"{experts[-1]}; on {pool.system.profile.name}: "
            f"{memory.fixed / 1e9:.1f} of {pool.system.profile.memory_bytes.value / 1e9:.0f} GB "
            "before any context (modelled)"
        )
    return lines
