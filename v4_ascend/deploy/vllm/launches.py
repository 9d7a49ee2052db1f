"""From pools of a plan to the processes of vLLM: one object decides what both roles share.

A pool that serves prefill and decode is one process for each host: the first has the API, the
others are headless. Apart, each DP rank is a process with an API of its own, behind a proxy, as
vllm-ascend's launch_online_dp.py starts them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from v4_ascend.config.topology import Topology, is_remote
from v4_ascend.deploy.vllm.arguments import arguments, parse, unknown_variables
from v4_ascend.deploy.vllm.recipes import Recipe, TransferPorts, recipe_for, recipes
from v4_ascend.errors import ConfigError, DeployError, NotYetError
from v4_ascend.supernode.environment import environment
from v4_ascend.supernode.plan import Role
from v4_ascend.supernode.planning import PoolPlan, layout_name

SIZED = ("HCCL_BUFFSIZE", "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT")  # published or larger
BLOCK_TOKENS = 128
PROXY = "load_balance_proxy_server_example.py"  # vllm-ascend examples/disaggregated_prefill_v1


@dataclass(frozen=True)
class Launch:
    """One process: where, with what, and how it says that it is ready.

    `order` is when it is started: those of one number together, lower ones first. `url` is where
    it answers HTTP, None for one that has no API. `env` may have ``{address}`` and ``{interface}``
    of the host in it.
    """

    host: str
    role: Role | str
    argv: tuple[str, ...]
    env: dict[str, str] = field(hash=False)
    order: int
    url: str | None

    @property
    def name(self) -> str:
        """What its log is called."""
        port = f"-{self.url.rpartition(':')[2]}" if self.url else ""
        return f"{self.role}-{self.host}{port}"


@dataclass(frozen=True)
class Shared:
    """What prefill and decode must agree on: both roles' commands are written from one."""

    block_size: int
    max_model_len: int
    ports: TransferPorts | None
    sizes: tuple[tuple[str, int, int], ...]  # role, DP and TP size of each pool

    def transfer(self, role: str, extra: dict[str, str]) -> dict[str, Any]:
        """Return the JSON of --kv-transfer-config for one role.

        Raises:
            ValueError: the pool serves both.
        """
        if self.ports is None:
            raise ValueError(role)
        is_prefill = role == "prefill"
        sizes = {r: {"dp_size": dp, "tp_size": tp} for r, dp, tp in self.sizes}
        return {
            "kv_connector": self.ports.connector,
            "kv_role": "kv_producer" if is_prefill else "kv_consumer",
            "kv_port": str(self.ports.prefill_port if is_prefill else self.ports.decode_port),
            "engine_id": "0" if is_prefill else "1",
            "kv_connector_extra_config": sizes | extra,
        }


def launches(topology: Topology, pools: tuple[PoolPlan, ...]) -> tuple[Launch, ...]:
    """Return every process of a deployment, in the order they are started.

    Raises:
        NotYetError: what vLLM could do and we do not write commands for.
        ConfigError: the proxy would listen where another process does.
        DeployError: a command that the release it is for would refuse.
    """
    shared = _shared(topology, pools)
    found: list[Launch] = []
    for pool in pools:
        _require_supported(topology, pool)
        found += _pool(topology, pool, shared)
    if len(pools) > 1:
        found.append(_proxy(topology, found))
    accepted = arguments(recipes().vllm)
    for launch in found:
        if launch.argv[0] == "vllm":
            parse(launch.argv, accepted)
            if unknown := unknown_variables(launch.env, accepted):
                raise DeployError(f"{launch.name}: {accepted.wheels[0]} never reads {unknown[0]}")
    return tuple(found)


def _shared(t: Topology, pools: tuple[PoolPlan, ...]) -> Shared:
    sizes = [
        (p.system.role, p.chosen.parallel.dp_size, p.chosen.parallel.tp_size)
        for p in pools
        if p.chosen is not None
    ]
    blocks = [p.block_size for p in t.cluster.pools if p.block_size is not None]
    ports = None
    if len(pools) > 1:
        family = pools[0].system.profile.family
        ports = next((r for r in recipes().transfer if family in r.families), None)
        if ports is None:
            raise NotYetError(
                t.where("cluster.pools"),
                f"cluster.pools: prefill and decode apart on {family} with engine vllm: not yet; "
                "A2, A3 and 950 are",
            )
    block = blocks[0] if blocks else BLOCK_TOKENS
    return Shared(block, t.serve.max_model_len, ports, tuple(sizes))


def _require_supported(t: Topology, pool: PoolPlan) -> None:
    if pool.chosen is None:
        raise ValueError("no legal layout")
    p = pool.chosen.parallel
    for is_asked, what in (
        (pool.system.profile.kind == "cpu" or pool.system.profile.emulated, "on a CPU"),
        (p.pp_size > 1, "with pp_size above 1"),
        (p.cp_size > 1, "with cp_size above 1"),
        (p.n_redundant_experts > 0, "with redundant experts"),
        (p.ep_size not in (1, p.stage_size), f"with EP groups inside dp * tp = {p.stage_size}"),
        (pool.system.devices_per_host % p.tp_size > 0, "with a TP group across hosts"),
    ):
        if is_asked:
            raise NotYetError(
                t.where("layout"), f"engine vllm {what}: not yet ({layout_name(p)}); use native"
            )


def _pool(t: Topology, pool: PoolPlan, shared: Shared) -> list[Launch]:
    if pool.chosen is None:
        raise ValueError("no legal layout")
    p, system, recipe = pool.chosen.parallel, pool.system, recipe_for(pool)
    env = _environment(pool, recipe)
    per_host = system.devices_per_host // p.tp_size  # DP groups
    n_hosts = -(-p.dp_size // per_host)
    common = _sizes(t, pool, recipe, shared)
    first, found = system.hosts[0], []
    for i, host in enumerate(system.hosts[:n_hosts]):
        groups = range(i * per_host, min((i + 1) * per_host, p.dp_size))
        place: dict[str, Any] = {"data-parallel-size": p.dp_size, "tensor-parallel-size": p.tp_size}
        if system.role == "both":
            if n_hosts > 1:
                place |= {
                    "data-parallel-size-local": len(groups),
                    "data-parallel-start-rank": groups.start,
                    "data-parallel-address": first,
                }
            api = i == 0
            if api:
                place |= {"host": t.serve.host, "port": t.serve.port}
            flags = place | common | ({} if api else {"headless": ""})
            if not api:
                flags.pop("api-server-count", None)
            url = f"http://{reached(t.serve.host)}:{t.serve.port}" if api else None
            found.append(_launch(t, host, "both", flags, env, range(len(groups) * p.tp_size), url))
        elif shared.ports is not None:
            for k, group in enumerate(groups):
                port = shared.ports.first_port + k
                devices = range(k * p.tp_size, (k + 1) * p.tp_size)
                own = place | {
                    "host": host,
                    "port": port,
                    "data-parallel-rank": group,
                    "data-parallel-address": first,
                }
                url = f"http://{host}:{port}"
                found.append(_launch(t, host, system.role, own | common, env, devices, url))
    return found


def _launch(
    t: Topology,
    host: str,
    role: Role,
    flags: dict[str, Any],
    env: dict[str, str],
    devices: range,
    url: str | None,
) -> Launch:
    repository, _, revision = t.model.checkpoint.rpartition(":")[2].partition("@")
    remote = is_remote(t.model.checkpoint)
    argv = ["vllm", "serve", repository if remote else t.model.checkpoint]
    if remote and revision:
        flags = {"revision": revision} | flags
    if t.model.checkpoint.startswith("modelscope:"):
        env = env | {"VLLM_USE_MODELSCOPE": "true"}
    for name, value in flags.items():
        argv.append(f"--{name}")
        if value != "":
            argv.append(json.dumps(value) if isinstance(value, dict) else str(value))
    visible = "ASCEND_RT_VISIBLE_DEVICES" if "HCCL_BUFFSIZE" in env else "CUDA_VISIBLE_DEVICES"
    own = env | {visible: ",".join(map(str, devices))}
    return Launch(host, role, tuple(argv), own, 0, url)


def _sizes(t: Topology, pool: PoolPlan, recipe: Recipe, shared: Shared) -> dict[str, Any]:
    """Return the flags all processes of a pool have: the plan's sizes, then the recipe's."""
    if pool.chosen is None:
        raise ValueError("no legal layout")
    p, serving = pool.chosen.parallel, pool.search.serving
    n_seqs = -(-pool.search.demand.concurrency // p.dp_size)
    n_drafts = t.serve.n_draft_tokens
    if pool.system.role == "prefill":
        n_drafts = min(n_drafts, 1)  # it only writes the drafter's cache
    n_batched = pool.max_chunk
    if pool.system.role == "decode" and not _chunk_given(t):
        n_batched = n_seqs * (1 + n_drafts)
    flags: dict[str, Any] = {
        "served-model-name": t.model.name,
        "max-model-len": shared.max_model_len,
        "max-num-seqs": n_seqs,
        "max-num-batched-tokens": n_batched,
        "gpu-memory-utilization": serving.utilisation,
        "block-size": shared.block_size,
    }
    if p.ep_size > 1:
        flags["enable-expert-parallel"] = ""
    flags |= recipe.flags
    if n_drafts:
        method = "mtp" if pool.search.config.dspark is None else "dspark"
        of_role = {"num_speculative_tokens": n_drafts, "method": method}
        flags["speculative-config"] = of_role | recipe.speculative
    if recipe.compilation:
        flags["compilation-config"] = recipe.compilation
    additional: dict[str, Any] = {k: v for k, v in recipe.additional.items() if v or k in _OFF}
    if recipe.ascend_compilation:
        additional["ascend_compilation_config"] = recipe.ascend_compilation
    if additional:
        flags["additional-config"] = additional
    if shared.ports is not None:
        flags["kv-transfer-config"] = shared.transfer(pool.system.role, recipe.transfer)
    return flags


_OFF = ("dp_allreduce_on_npu",)  # keys whose `false` is said; of others an entry takes `true` back


def _chunk_given(t: Topology) -> bool:
    return any(p.role == "decode" and p.max_chunk is not None for p in t.cluster.pools)


def _environment(pool: PoolPlan, recipe: Recipe) -> dict[str, str]:
    """Return the recipe's variables; where the plan needs a larger one, that."""
    env = dict(recipe.env)
    planned = {v.name: v.value for v in environment(pool)}
    for name in SIZED:
        if name in env and name in planned:
            env[name] = str(max(int(env[name]), int(planned[name])))
    return env


def _proxy(t: Topology, found: list[Launch]) -> Launch:
    """Return the command of vllm-ascend's example proxy, which clients speak to."""
    here = found[0].host
    taken = [x.url.rpartition(":")[2] for x in found if x.host == here and x.url is not None]
    if str(t.serve.port) in taken and t.serve.host in (*_EVERYWHERE, here):
        raise ConfigError(
            t.where("serve.port"),
            f"serve.port: {t.serve.port} is that of a process on {here}, where the proxy listens "
            "too; give another",
        )
    argv = ["python", PROXY, "--host", t.serve.host, "--port", str(t.serve.port)]
    for word, role in (("prefiller", "prefill"), ("decoder", "decode")):
        members = [x for x in found if x.role == role and x.url is not None]
        argv += [f"--{word}-hosts", *(x.host for x in members)]
        argv += [f"--{word}-ports", *((x.url or "").rpartition(":")[2] for x in members)]
    url = f"http://{reached(t.serve.host)}:{t.serve.port}"
    return Launch(here, "proxy", tuple(argv), {}, 1, url)


_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104


def reached(host: str) -> str:
    """Return an address to reach a server by that listens on all."""
    return "127.0.0.1" if host in _EVERYWHERE else host
