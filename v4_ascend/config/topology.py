"""The topology file: which devices, which model, how it is served."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from v4_ascend.config.load import load_yaml
from v4_ascend.errors import ConfigError, NotYetError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceProfile(_Section):
    """An inline device; bundled ones are named. Bytes, operations and bytes per second."""

    name: str
    memory_bytes: int = Field(gt=0)
    memory_bytes_per_s: float | None = None
    bf16_flops: float | None = None
    fp8_flops: float | None = None
    source: str


class Supernode(_Section):
    """Hosts on one fast fabric: by name, or by number for planning."""

    name: str
    hosts: tuple[str, ...] | None = None
    host_count: int | None = Field(default=None, ge=1)
    devices_per_host: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> Supernode:
        if (self.hosts is None) == (self.host_count is None):
            raise ValueError("give either hosts or host_count")
        if self.hosts is not None and len(set(self.hosts)) != len(self.hosts):
            raise ValueError("a host is named twice")
        return self

    @property
    def n_devices(self) -> int:
        """Devices of all its hosts."""
        n_hosts = len(self.hosts) if self.hosts is not None else self.host_count or 0
        return n_hosts * self.devices_per_host


class Pool(_Section):
    """Supernodes that serve one role."""

    role: Literal["prefill", "decode"]
    supernodes: tuple[str, ...]
    device: str | DeviceProfile | None = None


class Cluster(_Section):
    """The devices."""

    device: str | DeviceProfile
    supernodes: tuple[Supernode, ...] = Field(min_length=1)
    fabric: dict[str, int] = Field(default_factory=dict)
    pools: tuple[Pool, ...] = ()

    @property
    def n_devices(self) -> int:
        """Devices of all supernodes."""
        return sum(s.n_devices for s in self.supernodes)


class Model(_Section):
    """The checkpoint: a folder or ``hf:org/name@revision``."""

    checkpoint: str
    name: str
    reference: str | None = None


class SLO(_Section):
    """What a request may take, in milliseconds."""

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)


class Serve(_Section):
    """How requests are served."""

    max_model_len: int = Field(ge=1)
    concurrency: int = Field(default=8, ge=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    objective: Literal["throughput", "latency"] = "throughput"
    slo: SLO = SLO()
    api_keys: tuple[str, ...] = ()
    n_draft_tokens: int = Field(default=0, ge=0)


class ParallelConfig(_Section):
    """Sizes of the parallel groups, in devices.

    ``world_size = pp * dp * cp * tp``, ranks ordered pp slowest, then dp, cp, tp fastest.
    EP groups tile the ``dp * cp * tp`` devices of a stage.
    """

    pp_size: int = Field(default=1, ge=1)
    dp_size: int = Field(default=1, ge=1)
    cp_size: int = Field(default=1, ge=1)
    tp_size: int = Field(default=1, ge=1)
    ep_size: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.stage_size % self.ep_size:
            raise ValueError(
                f"ep_size ({self.ep_size}) must divide dp_size * cp_size * tp_size "
                f"({self.dp_size} * {self.cp_size} * {self.tp_size} = {self.stage_size})"
            )
        return self

    @property
    def stage_size(self) -> int:
        """Devices of one pipeline stage."""
        return self.dp_size * self.cp_size * self.tp_size

    @property
    def world_size(self) -> int:
        """Devices of all stages."""
        return self.pp_size * self.stage_size


class Runtime(_Section):
    """Choices of the serving processes."""

    backend: Literal["auto", "cpu", "cuda", "ascend", "mindspore"] = "auto"
    fallback: Literal["error", "reference"] = "error"
    dtype: Literal["fp32", "bf16"] | None = None
    quant_sim: Literal["auto", "on", "off"] = "auto"
    kernels: Literal["fast", "reference"] = "fast"
    max_chunk: int = Field(default=512, ge=1)


class Topology(_Section):
    """One deployment."""

    name: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]*$")
    cluster: Cluster
    model: Model
    serve: Serve
    layout: Literal["auto"] | ParallelConfig = "auto"
    runtime: Runtime = Runtime()
    engine: Literal["native", "vllm"] = "native"
    launcher: Literal["local", "ssh", "kubernetes"] = "local"
    emulate: bool = False


def load_topology(reference: str, overrides: Sequence[str] = ()) -> Topology:
    """Read a topology file by path, or a bundled one by name.

    Raises:
        ConfigError: no such file, or at ``file:line``, what is wrong there.
    """
    return load_yaml(Topology, topology_path(reference), overrides)


def topology_path(reference: str) -> Path:
    """Return the file a path or a bundled name means."""
    if "/" in reference or reference.endswith((".yaml", ".yml")):
        if Path(reference).is_file():
            return Path(reference)
        raise ConfigError(reference, "no such file")
    folder = Path(str(files("v4_ascend.configs") / "topology"))
    bundled = sorted(p.stem for p in folder.glob("*.yaml"))
    if reference not in bundled:
        raise ConfigError("--topology", f"no file {reference!r}; bundled: {', '.join(bundled)}")
    return folder / f"{reference}.yaml"


def require_supported(topology: Topology, where: str) -> None:
    """Refuse what the schema knows and deployment cannot do yet.

    Raises:
        NotYetError: naming the first such key.
    """
    t = topology
    for key, is_asked, today in (
        ("cluster.pools", bool(t.cluster.pools), "one pool for both roles"),
        ("cluster.device", t.cluster.device != "cpu", "'cpu'"),
        ("cluster.supernodes", t.cluster.n_devices != 1, "one device"),
        ("layout", t.layout != "auto" and t.layout.world_size != 1, "one rank"),
        ("model.reference", t.model.reference is not None, "a self-check of prefill and decode"),
        ("serve.n_draft_tokens", t.serve.n_draft_tokens > 0, "no speculation"),
        ("runtime.backend", t.runtime.backend not in ("auto", "cpu"), "'cpu'"),
        ("engine", t.engine != "native", "'native'"),
        ("launcher", t.launcher != "local", "'local'"),
        ("emulate", t.emulate, "real devices"),
    ):
        if is_asked:
            raise NotYetError(where, f"{key}: not yet; deploy does {today}")
