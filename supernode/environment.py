"""The environment of each host, derived from the plan; every line says why.

Sources: HCCL's pages on its variables (defaults, ranges), vllm-ascend's V4 tutorials, rule R21,
R22 and R26 of configs/rules.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass

from v4_ascend.supernode.collective_buffers import (
    MAX_TOKENS,
    min_buffsize_mb,
    n_hccl_communicators,
)
from v4_ascend.supernode.planning import PoolPlan

LOAD_BYTES_PER_S = 0.2e9  # of one device: published loads of V4-Pro run at 0.1 to 0.5 GB/s
READY_FACTOR = 2  # what waits allows twice what it waits for
HCCL_CONNECT = (120, 7200)  # seconds, HCCL's default and its maximum


@dataclass(frozen=True, slots=True)
class Variable:
    """One line of an env file."""

    name: str
    value: str
    reason: str


def environment(pool: PoolPlan) -> tuple[Variable, ...]:
    """Derive what every host of a pool exports; per-host lines are in `host_environment`."""
    if pool.chosen is None:
        return ()
    kind = pool.system.profile.kind
    common = _timeouts(pool)
    if kind != "cpu":  # where threads compute, the machine decides how many
        threads = "host threads a rank may take; engines' tutorials use 10"
        common = (Variable("OMP_NUM_THREADS", "10", threads), *common)
    if kind == "npu" and not pool.system.profile.emulated:
        return (*common, *_hccl(pool), *_npu())
    if kind == "cuda":
        return (
            *common,
            Variable(
                "PYTORCH_CUDA_ALLOC_CONF",
                "expandable_segments:True",
                "ragged batches fragment fixed segments",
            ),
        )
    return common


def host_environment(pool: PoolPlan, host: str) -> tuple[Variable, ...]:
    """Derive what one host exports besides."""
    used = pool.chosen.parallel.world_size if pool.chosen else 0
    n, index = pool.system.devices_per_host, pool.system.hosts.index(host)
    mine = max(0, min(n, used - index * n))
    name = {
        "npu": "ASCEND_RT_VISIBLE_DEVICES",
        "cuda": "CUDA_VISIBLE_DEVICES",
    }.get(pool.system.profile.kind)
    devices = ",".join(map(str, range(mine)))
    ranks = (
        Variable("V4_ASCEND_NODE_RANK", str(index), "place of the host in the plan"),
        Variable("V4_ASCEND_LOCAL_RANKS", str(mine), "ranks the plan puts here"),
    )
    return (*ranks, Variable(name, devices, "devices the plan uses here")) if name else ranks


def _timeouts(pool: PoolPlan) -> tuple[Variable, ...]:
    """Connect < execute < RPC < ready: the first to end names the cause."""
    weights = max(sum(_weights(m.terms)) for m in pool.chosen.memory) if pool.chosen else 0
    load = int(weights / LOAD_BYTES_PER_S)
    connect = min(max(HCCL_CONNECT[0], READY_FACTOR * load), HCCL_CONNECT[1])
    execute, rpc = connect + 60, connect + 120
    why = f"loading {weights / 1e9:.0f} GB a rank takes about {load} s at 0.2 GB/s (assumed)"
    lines = [
        Variable(
            "V4_ASCEND_RPC_TIMEOUT", str(rpc), "above the collectives', so that they name the rank"
        ),
        Variable("V4_ASCEND_READY_TIMEOUT", str(rpc + READY_FACTOR * load), f"{why}, twice"),
    ]
    if pool.system.profile.kind == "npu":
        lines += [
            Variable(
                "HCCL_CONNECT_TIMEOUT",
                str(connect),
                f"ranks wait for the slowest loader: {why}, twice; default 120, at most 7200",
            ),
            Variable("HCCL_EXEC_TIMEOUT", str(execute), "above connecting, below the RPC's"),
        ]
    return tuple(lines)


def _weights(terms: dict[str, int]) -> list[int]:
    others = {
        "request state",
        "prefix snapshots",
        "activations",
        "angle tables",
        "collective buffers",
        "driver",
        "graphs",
    }
    return [n for name, n in terms.items() if name not in others]


def _hccl(pool: PoolPlan) -> tuple[Variable, ...]:
    if pool.chosen is None:
        return ()
    p, family = pool.chosen.parallel, pool.system.profile.family
    serving, config = pool.search.serving, pool.search.config
    n = -(-pool.chosen.batch * (1 + serving.n_draft_tokens) // (p.tp_size * p.cp_size))
    capped = min(n, MAX_TOKENS[family])
    local = pool.search.memory.local_experts(p)
    mb = min_buffsize_mb(config, family, p.ep_size, local, capped) if p.ep_size > 1 else 200
    lines = [
        Variable(
            "HCCL_BUFFSIZE",
            str(mb),
            f"MB; dispatch and combine of {capped} tokens a rank over ep {p.ep_size} with {local} "
            f"local experts (R21); {n_hccl_communicators(p)} communicators take twice as much each",
        ),
        Variable(
            "HCCL_OP_EXPANSION_MODE",
            "HOST" if family == "a2" else "AIV",
            "HCCL's recommendation for inference on this chip",
        ),
        Variable(
            "HCCL_IF_BASE_PORT",
            "60000",
            "60000 to 60031; reserve them in net.ipv4.ip_local_reserved_ports",
        ),
    ]
    if family == "950":
        lines.append(Variable("HCCL_ALGO", "level0:fullmesh", "R26"))
    return tuple(lines)


def _npu() -> tuple[Variable, ...]:
    return (
        Variable(
            "PYTORCH_NPU_ALLOC_CONF",
            "expandable_segments:True",
            "ragged batches fragment fixed segments",
        ),
        Variable("TASK_QUEUE_ENABLE", "1", "launch ahead of the device"),
        Variable(
            "HCCL_SOCKET_IFNAME",
            "${V4_ASCEND_NIC:?the NIC that joins the hosts, such as eth0}",
            "not in the topology; must be set on the host",
        ),
        Variable("GLOO_SOCKET_IFNAME", "${V4_ASCEND_NIC}", "the same NIC"),
    )


def env_file(variables: tuple[Variable, ...]) -> str:
    """Spell variables for a shell, each under its reason."""
    return "".join(f"# {v.reason}\nexport {v.name}={_quote(v.value)}\n" for v in variables)


def _quote(value: str) -> str:
    return f'"{value}"' if any(c in value for c in " ${:") else value
