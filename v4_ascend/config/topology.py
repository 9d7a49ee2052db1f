"""The topology file: which devices, which model, how it is served."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from v4_ascend.config.devices import DeviceProfile, check_levels, device_profile
from v4_ascend.config.load import Section, did_you_mean, load_yaml
from v4_ascend.errors import ConfigError, NotYetError

MAX_DEVICES = 65536  # an HCCL rank table holds no more

# A host becomes a file's name, an argument of ssh and the comment of a script: printable, in one
# word, no path and no option. Whatever a shell would take for more is quoted where it is written.
HostName = Annotated[str, Field(pattern=r"^[!-,.0-~][!-.0-~]*$")]


class Supernode(Section):
    """Hosts on one fast fabric: by name, or by number for planning."""

    name: str = Field(min_length=1)
    hosts: tuple[HostName, ...] | None = Field(default=None, min_length=1)
    host_count: int | None = Field(default=None, ge=1)
    devices_per_host: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> Supernode:
        if (self.hosts is None) == (self.host_count is None):
            raise ValueError("give either hosts or host_count")
        return self

    @property
    def n_devices(self) -> int:
        """Devices of all its hosts."""
        n_hosts = len(self.hosts) if self.hosts is not None else self.host_count or 0
        return n_hosts * self.devices_per_host


class ParallelConfig(Section):
    """Sizes of the parallel groups, in devices.

    ``world_size = pp * dp * cp * tp``, ranks ordered pp slowest, then dp, cp, tp fastest.
    EP groups tile the ``dp * cp * tp`` devices of a stage. `dsa_cp` splits the tokens, not the
    heads, of sparse attention over the TP group. `n_redundant_experts` are further copies of
    busy experts in each EP group.
    """

    pp_size: int = Field(default=1, ge=1)
    dp_size: int = Field(default=1, ge=1)
    cp_size: int = Field(default=1, ge=1)
    tp_size: int = Field(default=1, ge=1)
    ep_size: int = Field(default=1, ge=1)
    dsa_cp: bool = False
    n_redundant_experts: int = Field(default=0, ge=0)

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


class Pool(Section):
    """Supernodes that serve one role; what is not given is the cluster's or `serve`'s."""

    role: Literal["prefill", "decode"]
    supernodes: tuple[str, ...] = Field(min_length=1)
    device: str | DeviceProfile | None = None
    layout: Literal["auto"] | ParallelConfig = "auto"
    concurrency: int | None = Field(default=None, ge=1)
    max_chunk: int | None = Field(default=None, ge=1)
    memory_utilisation: float | None = Field(default=None, gt=0, le=1)
    block_size: int | None = Field(default=None, ge=1)


class GivenLink(Section):
    """A link as the file's author knows it, instead of the profile's."""

    bytes_per_s: float = Field(gt=0)
    latency_s: float = Field(gt=0)


class GivenLevel(GivenLink):
    """A level of the fabric as the file's author knows it."""

    n_devices: int = Field(ge=2)


class Cluster(Section):
    """The devices. `fabric` has the devices of each all-to-all level, innermost first."""

    device: str | DeviceProfile
    supernodes: tuple[Supernode, ...] = Field(min_length=1)
    fabric: dict[str, int | GivenLevel] = Field(default_factory=dict)
    inter: GivenLink | None = None
    pools: tuple[Pool, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Cluster:
        names = [s.name for s in self.supernodes]
        for what, given in (
            ("supernode", names),
            ("host", [h for s in self.supernodes for h in s.hosts or ()]),
        ):
            if twice := sorted({n for n in given if given.count(n) > 1}):
                raise ValueError(f"{what} {twice[0]!r} is named twice")
        for pool in self.pools:
            if unknown := sorted(set(pool.supernodes) - set(names)):
                raise ValueError(f"no supernode {unknown[0]!r}{did_you_mean(unknown[0], names)}")
        members = [n for pool in self.pools for n in pool.supernodes]
        if shared := sorted({n for n in members if members.count(n) > 1}):
            raise ValueError(f"supernode {shared[0]!r} is in two pools")
        if self.pools and {p.role for p in self.pools} != {"prefill", "decode"}:
            raise ValueError("pools: there must be one for prefill and one for decode")
        if len(self.pools) > 2:
            raise ValueError(f"pools: {len(self.pools)} given, there can be one for each role")
        if self.n_devices > MAX_DEVICES:
            raise ValueError(f"{self.n_devices:,} devices, at most {MAX_DEVICES:,} have ranks")
        check_levels(self.level_sizes)
        return self

    @property
    def level_sizes(self) -> dict[str, int]:
        """Devices of each level of the given fabric."""
        return {
            name: level if isinstance(level, int) else level.n_devices
            for name, level in self.fabric.items()
        }

    @property
    def n_devices(self) -> int:
        """Devices of all supernodes."""
        return sum(s.n_devices for s in self.supernodes)


def is_remote(reference: str) -> bool:
    """Say whether a checkpoint's reference names a hub's repository, not a path."""
    return reference.startswith(("hf:", "modelscope:"))


class Model(Section):
    """The checkpoint: a folder, or ``hf:org/name@revision``, or ``modelscope:`` likewise."""

    checkpoint: str = Field(min_length=1)
    name: str = Field(min_length=1)
    reference: str | None = None
    weight_format: Literal["auto", "native", "mx", "w8a8", "w4a8", "bf16"] = "auto"


class SLO(Section):
    """What a request may take, in milliseconds."""

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)


class Workload(Section):
    """A typical request, in tokens: what time and rates are estimated for."""

    input_tokens: int = Field(default=8192, ge=1)
    output_tokens: int = Field(default=1024, ge=1)


ApiKey = Annotated[str, Field(pattern=r"^[!-~]+$")]  # what one word of an HTTP header can be


class Serve(Section):
    """How requests are served.

    `memory_utilisation` is the part of a device's memory that may be used at all. `cache_tokens`
    are those of all requests together whose compressed rows are kept, by default `concurrency`
    times the full length; `prefix_snapshots` the prefixes requests can go on behind, in each DP
    group; 0 computes every prompt whole.
    A step computes at most `n_draft_tokens` guesses of a request, and none that DSpark, with
    those before it, gives less of a chance than `min_draft_confidence`.
    Beyond loopback `deploy` wants an API key, unless `require_key` is false. `requests_per_minute`
    is a limit for each API key, or without keys for each address. Web pages of `cors_origins` may
    call the API.
    """

    max_model_len: int = Field(ge=1)
    concurrency: int = Field(default=8, ge=1)
    host: HostName = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    objective: Literal["throughput", "latency", "context", "devices"] = "throughput"
    slo: SLO = SLO()
    workload: Workload = Workload()
    memory_utilisation: float = Field(default=0.92, gt=0, le=1)
    api_keys: tuple[ApiKey, ...] = ()
    require_key: bool = True
    requests_per_minute: int | None = Field(default=None, ge=1)
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    cors_origins: tuple[str, ...] = ()
    n_draft_tokens: int = Field(default=0, ge=0)
    min_draft_confidence: float = Field(default=0.3, ge=0, le=1)
    cache_tokens: int | None = Field(default=None, ge=1)
    prefix_snapshots: int = Field(default=16, ge=0)


class Runtime(Section):
    """Choices of the serving processes; decode steps of `capture_sizes` sequences are captured."""

    backend: Literal["auto", "cpu", "cuda", "ascend", "mindspore"] = "auto"
    fallback: Literal["error", "reference"] = "error"
    dtype: Literal["fp32", "bf16"] | None = None
    quant_sim: Literal["auto", "on", "off"] = "auto"
    kernels: Literal["fast", "reference"] = "fast"
    max_chunk: int = Field(default=512, ge=1)
    capture_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = None


class Container(Section):
    """What a host's processes run in, with launcher docker or kubernetes.

    `image` is by default the published one with engine vllm, and with engine native what
    ``docker build`` makes of the repository's Dockerfile. The first host listens at `port`.
    """

    image: str | None = Field(default=None, min_length=1)
    port: int = Field(default=29400, ge=1, le=65535)


class Kubernetes(Section):
    """Where pods go, with launcher kubernetes.

    `resource` is the name of one device, by default that of the vendor's device plugin. With
    `checkpoint_claim`, ``claim`` or ``claim/path``, the checkpoint is on that persistent volume
    claim, else it is at the same path of every node. `queue` and `schedule_policy` are Volcano's.
    """

    namespace: str = Field(default="default", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    workload: Literal["leader-worker-set", "volcano-job", "ascend-job"] = "leader-worker-set"
    resource: str | None = Field(default=None, pattern=r"^[-a-z0-9.]+/[-A-Za-z0-9_.]+$")
    checkpoint_claim: str | None = Field(default=None, min_length=1)
    host_network: bool = False
    node_selector: dict[str, str] = Field(default_factory=dict)
    queue: str = "default"
    schedule_policy: str | None = None


class Topology(Section):
    """One deployment. With `emulate` a process of one machine stands for each of its devices."""

    name: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]*$")
    cluster: Cluster
    model: Model
    serve: Serve
    layout: Literal["auto"] | ParallelConfig = "auto"
    runtime: Runtime = Runtime()
    engine: Literal["native", "vllm"] = "native"
    launcher: Literal["local", "ssh", "docker", "kubernetes"] = "local"
    container: Container = Container()
    kubernetes: Kubernetes = Kubernetes()
    emulate: bool = False
    _places: Mapping[str, str] = PrivateAttr(default_factory=dict)

    def with_checkpoint(self, reference: str) -> Topology:
        """Return the same deployment of another checkpoint."""
        model = self.model.model_copy(update={"checkpoint": reference})
        return self.model_copy(update={"model": model})

    def where(self, key: str) -> str:
        """Return where a dotted key, or else the section around it, was given."""
        path = key
        while path and path not in self._places:
            path = path.rpartition(".")[0]
        return self._places.get(path, key)


def load_topology(reference: str, overrides: Sequence[str] = ()) -> Topology:
    """Read a topology file by path, or a bundled one by name.

    Raises:
        ConfigError: no such file or device, or at ``file:line``, what is wrong there.
    """
    loaded = load_yaml(Topology, topology_path(reference), overrides)
    topology = loaded.value
    topology._places = loaded.places
    device_profile(topology.cluster.device, topology.where("cluster.device"))
    for pool in topology.cluster.pools:
        if pool.device is not None:
            device_profile(pool.device, topology.where("cluster.pools"))
    return topology


def topology_schema() -> str:
    """Return the JSON schema of the file, for editors: configs/topology.schema.json."""
    return json.dumps(Topology.model_json_schema(), indent=2) + "\n"


def topology_path(reference: str) -> Path:
    """Return the file a path or a bundled name, with or without its suffix, means."""
    path = Path(reference)
    if path.is_file():
        return path
    folder = Path(str(files("v4_ascend.configs") / "topology"))
    bundled = sorted(p.stem for p in folder.glob("*.yaml"))
    if reference.removesuffix(".yaml") in bundled:
        return folder / f"{path.stem}.yaml"
    raise ConfigError("--topology", f"no file {reference!r}; bundled: {', '.join(bundled)}")


def require_supported(topology: Topology) -> None:
    """Refuse what the schema knows and deployment cannot do yet.

    Raises:
        NotYetError: where the first such key is given.
        ConfigError: several hosts, and what is meant for one.
    """
    t = topology
    n_hosts = sum(s.n_devices // s.devices_per_host for s in t.cluster.supernodes)
    by_itself = t.launcher in ("docker", "kubernetes")  # each host starts by itself
    native = t.engine == "native"  # vLLM has more, and its commands are refused where they are made
    is_emulated = device_profile(t.cluster.device, t.where("cluster.device")).emulated
    for key, is_asked, today in (
        (
            "cluster.pools",
            (native or t.launcher == "kubernetes") and bool(t.cluster.pools),
            "one pool for both roles",
        ),
        (
            "cluster.supernodes",
            n_hosts > 1
            and t.launcher != "kubernetes"
            and any(s.hosts is None for s in t.cluster.supernodes),
            "hosts with names",
        ),
        (
            "cluster.device",
            is_emulated and t.launcher != "local",
            "emulated NPUs with launcher local",
        ),
        ("emulate", t.emulate, "that with engine native and launcher local"),
    ):
        if is_asked:
            raise NotYetError(t.where(key), f"{key}: not yet; deploy does {today}")
    if n_hosts > 1 and t.launcher == "local":
        raise ConfigError(
            t.where("launcher"), f"launcher: {n_hosts} hosts need ssh; local is for one"
        )
    _require_key(t)
    _require_paths(t, by_itself=by_itself, n_hosts=n_hosts)


def _require_paths(t: Topology, *, by_itself: bool, n_hosts: int) -> None:
    """Refuse files that hosts will not find; those of containers need not be on this machine."""
    checkpoint, reference = t.model.checkpoint, t.model.reference
    if reference is not None and not by_itself and not Path(reference).is_file():
        raise ConfigError(
            t.where("model.reference"),
            f"model.reference: no file {reference}; v4-ascend parity record writes one",
        )
    if by_itself and is_remote(checkpoint):
        raise ConfigError(
            t.where("model.checkpoint"),
            f"model.checkpoint: {checkpoint}: containers are given a folder; fetch it, and name it",
        )
    who = "containers" if by_itself else "several hosts"
    for key, path in (("model.checkpoint", checkpoint), ("model.reference", reference)):
        is_asked = by_itself or (n_hosts > 1 and key == "model.checkpoint")
        if is_asked and path and not is_remote(path) and not Path(path).is_absolute():
            raise ConfigError(t.where(key), f"{key}: {path} is relative; {who} need a path from /")


def _require_key(t: Topology) -> None:
    serve = t.serve
    if serve.require_key and not serve.api_keys and not is_loopback(serve.host):
        raise ConfigError(
            t.where("serve.host"),
            f"serve.host: {serve.host} is beyond loopback and there is no API key; give "
            "serve.api_keys, or serve.require_key: false if anybody who reaches it may use it",
        )


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches what listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
