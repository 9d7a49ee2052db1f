"""One whole layer of a model on this device, beside the sum of its operators' floors.

Weights are random, in the checkpoint's formats and shapes; caches hold seeded rows. A device of a
deployment has a share of the experts and gets as many rows for them as its own tokens send
away: a layer with that many experts in all is the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from v4_ascend.backends import Backend
from v4_ascend.config.inventory import TensorSpec, inventory
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import ConfigError
from v4_ascend.model.block import Block
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.resident import resident_bytes
from v4_ascend.model.shard import Shard
from v4_ascend.ops import formats, use_policy
from v4_ascend.ops.op import Op
from v4_ascend.runtime.bench_context import filled_cache
from v4_ascend.runtime.bench_ops import Rates, timed
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.runtime.op_workloads import calls
from v4_ascend.runtime.workload import BF16, Maker, Workload

KINDS = {4: "CSA", 128: "HCA"}
# Of these the arguments are whole storages, of which a call reads some rows.
SPARSE = ("sparse_attn", "index_select", "compress_kv", "grouped_gemm", "store_rows")


@dataclass(frozen=True, slots=True)
class LayerTiming:
    """One decode step of one layer.

    Attributes:
        floor: the sum of what each of its operators and products takes at least.
        n_calls: of operators.
        weight_bytes: of the layer on this device.
    """

    kind: str
    how: str
    seconds: float
    floor: float
    n_calls: int
    weight_bytes: int


def bench_layer(
    backend: Backend,
    config: ModelConfig,
    work: Workload,
    rates: Rates,
    *,
    n_experts: int,
    records: tuple[str, str],
) -> Iterator[LayerTiming]:
    """Time a decode step of a CSA and of an HCA layer with `n_experts` on the device.

    Raises:
        ConfigError: not a decode step, or fewer experts than a token chooses.
    """
    if work.tokens != 1:
        raise ConfigError("--work", "a layer is timed decoding: decode:BATCH:CONTEXT")
    if not config.n_activated_experts <= n_experts <= config.n_routed_experts:
        few, all_of_them = config.n_activated_experts, config.n_routed_experts
        raise ConfigError("--experts", f"{n_experts}, must be {few} to {all_of_them}")
    config = config.model_copy(update={"n_routed_experts": n_experts})
    with torch.inference_mode(), use_policy(backend=backend.name):
        for ratio in KINDS:
            yield _layer(backend, config, work, rates, ratio, records)


def _layer(
    backend: Backend,
    config: ModelConfig,
    work: Workload,
    rates: Rates,
    ratio: int,
    records: tuple[str, str],
) -> LayerTiming:
    device = backend.device()
    make = Maker(device)
    ratios = config.compress_ratios
    number = next(n for n, r in enumerate(ratios) if r == ratio and n >= config.n_hash_layers)
    specs = {s.name: s for s in inventory(config) if s.name.startswith(f"layers.{number}.")}

    def source(name: str) -> torch.Tensor:
        return _random(specs[name], make)

    numerics = Numerics(BF16, quant_sim=True)
    block = Block.read(source, f"layers.{number}", config, number, numerics, Shard.whole(config))
    n = work.context + 1
    cache = filled_cache(config, records, work.batch, n, backend, (number, number + 1))
    batch = cache.batch([Chunk(slot, [slot], work.context) for slot in range(work.batch)])
    x = make.normal(work.batch, config.hc_mult, config.dim)
    floor = _Floor(config, work, rates, records, ratio)
    with use_policy(around=floor.called):
        block(x, batch, batch, cache.layers[0])
    seconds, how = timed(lambda: block(x, batch, batch, cache.layers[0]), device)
    plain = sum(t.nbytes for t in (block.attn.wo_a, block.ffn.gate.weight))
    if block.attn.indexer is not None:
        plain += block.attn.indexer.weights_proj.nbytes
    total = floor.seconds + plain / rates.copy
    return LayerTiming(KINDS[ratio], how, seconds, total, floor.n_calls, resident_bytes(block))


def _random(spec: TensorSpec, make: Maker) -> torch.Tensor:
    """Return values of about the size that keeps a layer's streams about the size they have."""
    shape = spec.shape
    if spec.dtype == "F8_E8M0":
        return make.integers(118, 122, *shape, dtype=torch.uint8).view(formats.E8M0)
    if spec.dtype == "F8_E4M3":
        return make.normal(*shape, dtype=torch.float32).to(formats.FP8)
    if spec.dtype == "I8":
        return make.integers(-128, 128, *shape, dtype=torch.int8)
    dtype = BF16 if spec.dtype == "BF16" else torch.float32
    return make.normal(*shape, dtype=dtype, scale=shape[-1] ** -0.5)


class _Floor:
    """Sums the least that each operator of a layer takes, as it is called."""

    def __init__(
        self,
        config: ModelConfig,
        work: Workload,
        rates: Rates,
        records: tuple[str, str],
        ratio: int,
    ) -> None:
        self.seconds, self.n_calls, self._rates = 0.0, 0, rates
        floors: dict[str, list[float]] = {}
        for call in calls(config, work, Maker("cpu"), *records):
            if call.op in SPARSE and not _is_of(call.what, ratio):
                continue
            floors.setdefault(call.op, []).append(rates.floor(call))
        self._floors = floors

    def called(self, op: Op[..., Any], kernel: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call an operator and add its floor: a `Policy.around`."""
        result = kernel(*args, **named)
        self.n_calls += 1
        self.seconds += self._of(op, [*args, *named.values()], result)
        return result

    def _of(self, op: Op[..., Any], given: list[Any], result: Any) -> float:
        routed = self._floors.get(op.name)
        if op.name == "store_rows":
            return max(2 * given[1].nbytes / self._rates.copy, self._rates.node)
        is_shared = op.name == "grouped_gemm" and len(given[2]) == 1
        if op.name in SPARSE and routed and not is_shared:
            return routed.pop(0) if len(routed) > 1 else routed[0]
        results = result if isinstance(result, tuple) else (result,)
        moved = {id(t): t.nbytes for t in (*given, *results) if isinstance(t, torch.Tensor)}
        return max(sum(moved.values()) / self._rates.copy, self._rates.node)


def _is_of(what: str, ratio: int) -> bool:
    """Whether a call's name is one of this layer's: those that name no kind are of both."""
    named = next((r for r, kind in KINDS.items() if what.startswith(kind)), ratio)
    return named == ratio
