"""The Plan: which rank holds what, and how it is served; what every later step reads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from v4_ascend.config.devices import DeviceProfile, device_profile
from v4_ascend.config.private import write_private
from v4_ascend.config.topology import ParallelConfig, Topology
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.capture import default_sizes, why_no_graphs
from v4_ascend.supernode.experts import LayerPlacement

Backend = Literal["cpu", "cuda", "ascend", "mindspore"]
Role = Literal["both", "prefill", "decode"]
BACKEND_OF_KIND: dict[str, Backend] = {"cpu": "cpu", "cuda": "cuda", "npu": "ascend"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rank(_Frozen):
    """What one rank holds: half-open ranges of layers and of routed experts.

    `device` is its number on the host. Where the plan places experts layer by layer, `experts` is
    the range it would have by number.
    """

    rank: int
    host: str
    device: int = 0
    layers: tuple[int, int]
    experts: tuple[int, int]


class Plan(_Frozen):
    """One deployment, decided. Its digest is the identity ranks agree on.

    `expert_placement` has, for each layer, the experts of each rank of an EP group by slot; None
    means by number, as `Rank.experts` says. `cache_tokens` are those of all requests together
    whose compressed rows fit; None is full length for each. A DP group can keep what lets
    requests go on behind as many prefixes as it has `prefix_snapshots`.
    """

    schema_version: Literal[1] = 1
    name: str
    role: Role = "both"
    device: str
    backend: Backend
    chip: str | None
    emulated: bool
    checkpoint: str
    model_name: str
    reference: str | None = None
    parallel: ParallelConfig
    ranks: tuple[Rank, ...]
    expert_placement: tuple[LayerPlacement, ...] | None = None
    host: str
    port: int
    max_model_len: int
    max_batch_size: int
    max_chunk: int
    cache_tokens: int | None = None
    prefix_snapshots: int = 16
    capture_sizes: tuple[int, ...] | None = ()  # None: as many as can be, of few sequences
    n_draft_tokens: int = 0
    min_draft_confidence: float = 0.3
    dtype: Literal["fp32", "bf16"] | None
    quant_sim: Literal["auto", "on", "off"]
    kernels: Literal["fast", "reference"]
    fallback: Literal["error", "reference"]
    api_keys: tuple[str, ...]
    requests_per_minute: int | None
    max_body_bytes: int
    cors_origins: tuple[str, ...]

    @property
    def slots_per_group(self) -> int:
        """Sequences each DP group has caches for."""
        return -(-self.max_batch_size // self.parallel.dp_size)

    @property
    def digest(self) -> str:
        """Return the sha256 of the plan's canonical JSON."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def write(self, file: Path) -> None:
        """Write the plan whole or not at all, readable by its owner alone: it may hold keys."""
        write_private(file, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> Plan:
        """Read a plan.

        Raises:
            ConfigError: not there, or not a plan of this version.
        """
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(str(file), f"cannot be read: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise ConfigError(str(file), f"is not UTF-8 text: {e.reason}") from e
        except ValidationError as e:
            problem = e.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise ConfigError(str(file), f"is not a plan: {key}: {problem['msg']}") from e


def rank_name(plan: Plan, rank: int) -> str:
    """Say which rank it is, and what it holds."""
    r, p = plan.ranks[rank], plan.parallel
    return (
        f"rank {rank} (stage {rank // p.stage_size}, layers {r.layers[0]} to "
        f"{r.layers[1] - 1}, experts {r.experts[0]} to {r.experts[1] - 1}, "
        f"{r.host} device {r.device})"
    )


def experts_of(plan: Plan, rank: Rank) -> tuple[tuple[int, ...], ...]:
    """Return the routed experts a rank holds in each of its layers, by slot."""
    p = plan.parallel
    if plan.expert_placement is None:
        return (tuple(range(*rank.experts)),) * (rank.layers[1] - rank.layers[0])
    group_rank = rank.rank % p.stage_size % p.ep_size
    return tuple(layer[group_rank] for layer in plan.expert_placement[slice(*rank.layers)])


def plan_of(
    topology: Topology,
    parallel: ParallelConfig,
    ranks: tuple[Rank, ...],
    profile: DeviceProfile | None = None,
    role: Role = "both",
    placement: tuple[LayerPlacement, ...] | None = None,
) -> Plan:
    """Join a layout and its ranks with what the topology says about serving.

    Raises:
        ConfigError: steps are to be captured that cannot be.
    """
    t, serve = topology, topology.serve
    if profile is None:
        profile = device_profile(t.cluster.device, t.where("cluster.device"))
    of_device = BACKEND_OF_KIND[profile.kind]
    return Plan(
        name=t.name,
        role=role,
        device=profile.name,
        backend=of_device if t.runtime.backend == "auto" else t.runtime.backend,
        chip=profile.soc,
        emulated=profile.emulated,
        checkpoint=t.model.checkpoint,
        model_name=t.model.name,
        reference=t.model.reference,
        parallel=parallel,
        ranks=ranks,
        expert_placement=placement,
        host=serve.host,
        port=serve.port,
        max_model_len=serve.max_model_len,
        max_batch_size=serve.concurrency,
        max_chunk=min(t.runtime.max_chunk, serve.max_model_len),
        cache_tokens=serve.cache_tokens,
        capture_sizes=_capture_sizes(t, parallel, profile, of_device),
        prefix_snapshots=serve.prefix_snapshots,
        n_draft_tokens=serve.n_draft_tokens,
        min_draft_confidence=serve.min_draft_confidence,
        dtype=t.runtime.dtype,
        quant_sim=t.runtime.quant_sim,
        kernels=t.runtime.kernels,
        fallback=t.runtime.fallback,
        api_keys=serve.api_keys,
        requests_per_minute=serve.requests_per_minute,
        max_body_bytes=serve.max_body_bytes,
        cors_origins=serve.cors_origins,
    )


def _capture_sizes(
    t: Topology, parallel: ParallelConfig, profile: DeviceProfile, backend: str
) -> tuple[int, ...] | None:
    asked, where = t.runtime.capture_sizes, t.where("runtime.capture_sizes")
    n_slots = -(-t.serve.concurrency // parallel.dp_size)
    why = why_no_graphs(t, parallel, backend, emulated=profile.emulated)
    if asked is None and why is None and backend == "cpu":  # the rank sees which kernels it has
        return None
    if asked is None:  # no NPU has been seen to capture; it has to be asked for
        return default_sizes(n_slots) if backend == "cuda" and why is None else ()
    if asked and why:
        raise ConfigError(where, f"{list(asked)}: {why}; leave it out, or give []")
    if list(asked) != sorted(set(asked)):
        raise ConfigError(where, f"{list(asked)} must ascend")
    if asked and asked[-1] > n_slots:
        raise ConfigError(where, f"{asked[-1]} sequences, each DP group serves {n_slots}")
    return asked
