"""From a topology to plans: one search for each pool, the chosen layout laid out on its devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from v4_ascend.config.devices import DeviceProfile, WeightFormat
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_names, preset_path
from v4_ascend.config.topology import ParallelConfig, Pool, Topology, is_remote
from v4_ascend.errors import ConfigError, NotYetError, PlanError
from v4_ascend.supernode.cache import BLOCK_TOKENS
from v4_ascend.supernode.experts import ExpertLoad, by_number, place_layer
from v4_ascend.supernode.holdings import holdings
from v4_ascend.supernode.memory import Serving
from v4_ascend.supernode.plan import Plan, Rank, plan_of
from v4_ascend.supernode.search import Choice, Demand, Found, Search
from v4_ascend.supernode.system import System, systems

MANY_EXPERTS = 256  # above it, INT4 experts are what is published for A2 and A3
POOL_BLOCK = 128


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The model a plan is for, and where its configuration came from."""

    config: ModelConfig
    name: str
    source: str


@dataclass(frozen=True)
class PoolPlan:
    """One pool: its devices, what was found on them, and what the best is."""

    system: System
    search: Search
    found: Found
    max_chunk: int

    @property
    def chosen(self) -> Choice | None:
        """The best layout, if any is legal."""
        return self.found.choices[0] if self.found.choices else None


def find_model(
    topology: Topology, asked: str | None = None, fetch: Callable[[str], Path] | None = None
) -> PlannedModel:
    """Read the configuration of `asked`, a path or a bundled name, or of the topology's model.

    Planning needs no weights: where the checkpoint is not on this machine, the bundled
    configuration that `model.name` names is taken, and `source` says so. `fetch` brings the
    configuration of what is asked from a hub, or of the topology's where none is bundled.

    Raises:
        ConfigError: there is neither.
    """
    if asked is not None:
        if fetch is not None and is_remote(asked):
            name = asked.partition("@")[0].rpartition("/")[2]
            return PlannedModel(ModelConfig.read(fetch(asked)), name, asked)
        if (path := existing_path(asked)) is not None:
            return PlannedModel(ModelConfig.read(path), path.name, str(path))
        short = asked.removeprefix("v4-")
        return PlannedModel(
            bundled_model(short, "--model"), asked, f"bundled configuration {short!r}"
        )
    model = topology.model
    if (folder := Path(model.checkpoint)).is_dir():
        return PlannedModel(ModelConfig.read(folder), model.name, str(folder))
    short = model.name.removeprefix("v4-")
    if fetch is not None and is_remote(model.checkpoint) and short not in preset_names():
        return PlannedModel(ModelConfig.read(fetch(model.checkpoint)), model.name, model.checkpoint)
    config = bundled_model(short, topology.where("model.name"))
    why = f"bundled configuration {short!r}; {model.checkpoint} is not on this machine"
    return PlannedModel(config, model.name, why)


def existing_path(model: str) -> Path | None:
    """Return the folder or file that `model` names, if it is one."""
    path = Path(model)
    return path if path.exists() else None


def bundled_model(name: str, where: str) -> ModelConfig:
    """Read a bundled configuration; `where` is what asked for it.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        return ModelConfig.read(preset_path(name))
    except ConfigError as e:
        known = str(e).partition("there are ")[2]
        raise ConfigError(
            where, f"no checkpoint here and no bundled configuration {name!r}; known are {known}"
        ) from None


def weight_format(config: ModelConfig, profile: DeviceProfile, asked: str) -> WeightFormat:
    """Return the asked format, or what is published for such a model on such a device."""
    for fmt in profile.weight_formats:
        if asked == fmt:
            return fmt
    if asked != "auto":
        raise ConfigError(
            "model.weight_format",
            f"{asked} on {profile.name}, which takes {', '.join(profile.weight_formats)}",
        )
    first = profile.weight_formats[0]
    return "w4a8" if first == "w8a8" and config.n_routed_experts > MANY_EXPERTS else first


def plan_pools(
    topology: Topology, model: PlannedModel, expert_load: ExpertLoad | None = None
) -> tuple[PoolPlan, ...]:
    """Search a layout for each pool; `expert_load` lets it copy and place busy experts.

    Raises:
        ConfigError: the model is not made for the asked length, or the pools' caches differ.
    """
    t, config = topology, model.config
    if t.serve.max_model_len > config.max_seq_len:
        raise ConfigError(
            t.where("serve.max_model_len"),
            f"serve.max_model_len ({t.serve.max_model_len}) exceeds what the model is made for "
            f"({config.max_seq_len})",
        )
    pools = {p.role: p for p in t.cluster.pools}
    _check_pools(t)
    plans = []
    for system in systems(t):
        pool = pools.get(system.role) if system.role != "both" else None
        plans.append(_plan_pool(t, config, system, pool, expert_load))
    return tuple(plans)


def _check_pools(t: Topology) -> None:
    """Prefill and decode must write and read the same caches (rule R15)."""
    blocks = {p.role: p.block_size or POOL_BLOCK for p in t.cluster.pools}
    if len(set(blocks.values())) > 1:
        raise ConfigError(
            t.where("cluster.pools"),
            f"E-POOLS-DIFFER: block_size {blocks['prefill']} for prefill and {blocks['decode']} "
            "for decode: the decode side would read garbage (vllm-ascend issue 14545); give both "
            "the same",
        )


def _plan_pool(
    t: Topology,
    config: ModelConfig,
    system: System,
    pool: Pool | None,
    expert_load: ExpertLoad | None,
) -> PoolPlan:
    serve = t.serve
    chunk = pool.max_chunk if pool and pool.max_chunk else t.runtime.max_chunk
    use = pool.memory_utilisation if pool and pool.memory_utilisation else serve.memory_utilisation
    serving = Serving(
        weight_format=weight_format(config, system.profile, t.model.weight_format),
        engine=t.engine,
        max_model_len=serve.max_model_len,
        max_chunk=min(chunk, serve.max_model_len),
        n_draft_tokens=0 if system.role == "prefill" else serve.n_draft_tokens,
        utilisation=use,
        n_snapshots=serve.prefix_snapshots if t.engine == "native" else 0,
    )
    work = serve.workload
    if work.input_tokens + work.output_tokens > serve.max_model_len:
        # The default workload is longer than short contexts allow: scale it into them.
        n_out = max(1, serve.max_model_len // 9)
        work = work.model_copy(
            update={"input_tokens": max(1, serve.max_model_len - n_out), "output_tokens": n_out}
        )
    demand = Demand(
        concurrency=pool.concurrency if pool and pool.concurrency else serve.concurrency,
        objective=serve.objective,
        workload=work,
        ttft_ms=serve.slo.ttft_ms,
        tpot_ms=serve.slo.tpot_ms,
        expert_load=expert_load,
    )
    search = Search(config, system, serving, demand)
    layout = pool.layout if pool else t.layout
    if layout != "auto" and layout.world_size > system.n_devices:
        raise ConfigError(
            t.where("layout"),
            f"layout: {layout.world_size} ranks, the pool has {system.n_devices} devices",
        )
    found = search.run(None if layout == "auto" else layout)
    return PoolPlan(system, search, found, serving.max_chunk)


def with_one_more_host(plan: PoolPlan) -> Choice | None:
    """Return the best choice if the last supernode had one more host."""
    s = plan.system
    grown = replace(
        s,
        hosts=(*s.hosts, "one-more"),
        supernode_sizes=(*s.supernode_sizes[:-1], s.supernode_sizes[-1] + s.devices_per_host),
    )
    found = Search(plan.search.config, grown, plan.search.serving, plan.search.demand).run()
    return found.choices[0] if found.choices else None


def ranks_of(system: System, config: ModelConfig, choice: Choice) -> tuple[Rank, ...]:
    """Lay a choice out: ranks pp slowest, EP groups of consecutive ranks, devices in order."""
    p, ranks = choice.parallel, []
    own = by_number(config.n_routed_experts, p.ep_size)
    for rank in range(p.world_size):
        stage, within = divmod(rank, p.stage_size)
        experts = own[within % p.ep_size]
        ranks.append(
            Rank(
                rank=rank,
                host=system.host_of(rank),
                device=rank % system.devices_per_host,
                layers=choice.layers[stage],
                experts=(experts[0], experts[-1] + 1),
            )
        )
    return tuple(ranks)


def plan_for(topology: Topology, pool: PoolPlan) -> Plan:
    """Write the chosen layout of a pool as the plan later steps read.

    Raises:
        ValueError: no layout is legal.
    """
    if pool.chosen is None:
        raise ValueError("no legal layout")
    p, config, load = pool.chosen.parallel, pool.search.config, pool.search.demand.expert_load
    placement = None
    if load is not None and p.ep_size > 1:
        placement = load.place(p.ep_size, p.n_redundant_experts)
    elif p.n_redundant_experts:
        even = place_layer([1] * config.n_routed_experts, p.ep_size, p.n_redundant_experts)
        placement = (even,) * config.n_layers
    ranks = ranks_of(pool.system, config, pool.chosen)
    plan = plan_of(topology, p, ranks, pool.system.profile, pool.system.role, placement)
    profile = pool.system.profile
    if plan.cache_tokens is None and profile.kind != "cpu" and not profile.emulated:
        # What the memory plan leaves, which may be less than full length for everybody.
        fits = pool.chosen.max_context * p.dp_size
        return plan.model_copy(update={"cache_tokens": fits})
    return plan


def deploy_plan(topology: Topology, config: ModelConfig) -> Plan:
    """Plan what is to run: the topology's layout, or the best one of its devices.

    Raises: as `deploy_pool` does.
    """
    return deploy_pool(topology, config)[0]


def deploy_pool(topology: Topology, config: ModelConfig) -> tuple[Plan, PoolPlan]:
    """Plan what is to run, and return with it the devices and what else was weighed.

    Raises:
        ConfigError: the model is not made for the asked length, or TP cuts through a block of it.
        PlanError: no layout is legal; the message has the rule and its numbers.
    """
    t = topology
    (pool,) = plan_pools(t, PlannedModel(config, t.model.name, t.model.checkpoint))
    if pool.chosen is None:
        refused = pool.found.rejected[0]
        raise PlanError(
            f"no legal layout of {t.model.name} on {pool.system.n_devices} x "
            f"{pool.system.profile.name}: {refused.rule.code}: {refused.examples[0][1]}; "
            "v4-ascend plan --explain has all reasons"
        )
    plan = plan_for(t, pool)
    if plan.n_draft_tokens:
        _require_drafter(t, config, plan, pool.system.profile)
    if plan.cache_tokens is not None:
        share = plan.cache_tokens // plan.parallel.dp_size
        if share < plan.max_model_len:
            raise ConfigError(
                t.where("serve.cache_tokens"),
                f"serve.cache_tokens: {share} tokens for each of {plan.parallel.dp_size} DP "
                f"groups; one request of serve.max_model_len needs {plan.max_model_len}",
            )
    try:
        for stage in range(plan.parallel.pp_size):
            holdings(config, plan, plan.ranks[stage * plan.parallel.stage_size])
    except ValueError as e:
        raise ConfigError(t.where("layout"), str(e)) from e
    return plan, pool


def _require_drafter(t: Topology, config: ModelConfig, plan: Plan, profile: DeviceProfile) -> None:
    """Refuse more drafts than the drafter makes, or one on a device that has no room for it."""
    where, n = t.where("serve.n_draft_tokens"), plan.n_draft_tokens
    if config.dspark is None and n >= BLOCK_TOKENS:
        raise ConfigError(
            where,
            f"serve.n_draft_tokens: {n}; no draft ends a group of {BLOCK_TOKENS} tokens: "
            f"at most {BLOCK_TOKENS - 1}",
        )
    if config.dspark is not None and n > config.dspark.block_size:
        raise ConfigError(
            where,
            f"serve.n_draft_tokens: {n}; the checkpoint's drafter guesses "
            f"{config.dspark.block_size} at once",
        )
    is_vendors = profile.records.kv == "fp8_640" and plan.kernels == "fast"
    if config.dspark is not None and is_vendors and plan.fallback == "error":
        raise NotYetError(
            where,
            f"serve.n_draft_tokens: DSpark on {profile.name}: not yet; the attention over its "
            f"FP8 rows takes windows of {config.window_size} tokens, a block's tokens see "
            f"{config.window_size + config.dspark.block_size}; runtime.fallback: reference, or 0",
        )


def layout_name(p: ParallelConfig) -> str:
    """Spell a layout: pp1 dp16 tp1 ep16."""
    cp = f" cp{p.cp_size}" if p.cp_size > 1 else ""
    dsa = " dsa-cp" if p.dsa_cp else ""
    more = f" +{p.n_redundant_experts}" if p.n_redundant_experts else ""
    return f"pp{p.pp_size} dp{p.dp_size}{cp} tp{p.tp_size} ep{p.ep_size}{more}{dsa}"
