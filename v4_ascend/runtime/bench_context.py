"""Seconds of a decoded token against what lies behind it and how many sequences decode.

Caches hold seeded rows, so that a context of a million tokens costs no prefill. Beside each time
stands its floor: the bytes a perfect step reads over a copy's bandwidth, or its operations over
the rate of a large product, both measured in the same run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from v4_ascend.backends import Backend
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import ConfigError
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.resident import resident_bytes
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import store_rows, use_policy
from v4_ascend.ops.records import RECORDS
from v4_ascend.runtime.bench_ops import Rates
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.load import load_model
from v4_ascend.runtime.op_workloads import Unit
from v4_ascend.runtime.parity import cache_records

PIECE = 1 << 16  # rows filled at once
WARM = 2  # steps that do not count


@dataclass(frozen=True, slots=True)
class Point:
    """The median step of one batch and context, and what no step could undercut.

    Attributes:
        weight_bytes, cache_bytes, operations: of a perfect step.
        why: it was not run, and why; `seconds` is 0 then.
    """

    batch: int
    context: int
    seconds: float
    floor: float
    weight_bytes: float
    cache_bytes: float
    operations: float
    why: str = ""


def bench_context(
    checkpoint: Checkpoint,
    backend: Backend,
    rates: Rates,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    n_steps: int,
    progress: Callable[[int, int], None],
) -> Iterator[Point]:
    """Time decoding behind each context, batch by batch.

    Raises:
        ConfigError: a context is longer than the model's.
    """
    config, longest = checkpoint.config, max(contexts)
    if longest > config.max_seq_len:
        raise ConfigError("--context", f"{longest} is more than the model's {config.max_seq_len}")
    if min(contexts) < WARM + n_steps:
        raise ConfigError("--context", f"{min(contexts)} is less than {WARM + n_steps} steps take")
    numerics = Numerics.of(config, None, "auto")
    records = cache_records(backend, config, numerics, "fast")
    device = backend.device()
    with torch.inference_mode(), use_policy(backend=backend.name):
        model = load_model(
            checkpoint, numerics, with_drafter=False, progress=lambda *_: None, device=device
        )
        for number, batch in enumerate(batches):
            fitting = [c for c in sorted(contexts) if not _why_not(config, records, batch, c)]
            cache = filled_cache(config, records, batch, max(fitting), backend) if fitting else None
            for context in sorted(contexts):
                costs = step_costs(model, records, batch, context)
                unit: Unit = "fp32" if numerics.dtype == torch.float32 else "bf16"
                floor = max(sum(costs[:2]) / rates.copy, costs[2] / rates.products[unit])
                if cache is None or context not in fitting:
                    why = _why_not(config, records, batch, context) or ""
                    yield Point(batch, context, 0.0, floor, *costs, why=why)
                    continue
                yield Point(batch, context, _time(model, cache, context, n_steps), floor, *costs)
            progress(number + 1, len(batches))


def step_costs(
    model: Transformer, records: tuple[str, str], batch: int, context: int
) -> tuple[float, float, float]:
    """Return bytes of weights, bytes of caches and operations of a step, all read once.

    Of the experts those are read that some token of the batch is expected to choose.
    """
    c = model.config
    experts = float(sum(resident_bytes(block.ffn.experts) for block in model.layers))
    embed = 0 if model.embed is None else model.embed.nbytes
    dense = resident_bytes(model) - experts - embed
    chosen = 1 - (1 - c.n_activated_experts / c.n_routed_experts) ** batch
    kv, index = (_row_bytes(c, records, n) for n in (0, 1))
    cache = operations = 0.0
    for ratio in c.compress_ratios[: c.n_layers]:
        seen, compressed = min(context, c.window_size), context // ratio if ratio else 0
        if ratio == 4:
            cache += compressed * index
            operations += 2.0 * compressed * c.index_n_heads * c.index_head_dim
            compressed = min(compressed, c.index_topk)
        seen += compressed
        cache += seen * kv
        operations += 4.0 * seen * c.n_heads * c.head_dim
    expert = model.layers[0].ffn.experts.w13.weight
    each = expert.element_size() / (2 if expert.dtype == torch.int8 else 1)  # FP4: two in a byte
    values = experts * c.n_activated_experts / c.n_routed_experts / each
    quantised = model.numerics.quant_sim and c.quantization is not None
    values += dense / (1 if quantised else model.numerics.dtype.itemsize)
    return dense + experts * chosen, batch * cache, batch * (operations + 2 * values)


def _row_bytes(config: ModelConfig, records: tuple[str, str], which: int) -> float:
    width = (config.head_dim, config.index_head_dim)[which]
    storage = RECORDS[records[which]].new_storage(1, 1, width, torch.device("cpu"))
    return float(storage.nbytes)


def _why_not(config: ModelConfig, records: tuple[str, str], batch: int, context: int) -> str | None:
    """Refuse caches of more than half of the memory: filling them would push the rest out."""
    kv, index = (_row_bytes(config, records, n) for n in (0, 1))
    rows = sum(context // r * (kv + (index if r == 4 else 0)) for r in config.compress_ratios if r)
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    if batch * rows <= most:
        return None
    return f"caches of {batch * rows / 1e9:.1f} GB are more than half of the memory"


def filled_cache(
    config: ModelConfig,
    records: tuple[str, str],
    batch: int,
    longest: int,
    backend: Backend,
    layers: tuple[int, int] | None = None,
) -> KVCache:
    """Return caches of `batch` sequences, all of their rows seeded; of some layers or of all."""
    kv, index = records
    cache = KVCache(
        config,
        n_slots=batch,
        max_model_len=longest,
        max_chunk=1,
        kv_record=kv,
        index_record=index,
        device=backend.device(),
        min_page_rows=backend.min_page_rows,
        layers=layers or (0, config.n_layers),
    )
    g = torch.Generator(cache.device).manual_seed(0)
    for layer in cache.layers:
        for storage, record, width in (
            (layer.window, kv, config.head_dim),
            (layer.compressed, kv, config.head_dim),
            (layer.index, index, config.index_head_dim),
        ):
            if storage is not None:
                _fill(storage, record, width, g)
        for state in (layer.state, layer.index_state):
            if state is not None:
                state.normal_(generator=g)
    return cache


def _fill(storage: torch.Tensor, record: str, width: int, g: torch.Generator) -> None:
    n_rows = storage.shape[0] * storage.shape[1]
    for begin in range(0, n_rows, PIECE):
        slots = torch.arange(begin, min(begin + PIECE, n_rows), device=storage.device)
        rows = torch.randn(len(slots), width, generator=g, device=storage.device)
        store_rows(storage, rows.to(torch.bfloat16), slots, record)


def _time(model: Transformer, cache: KVCache, context: int, n_steps: int) -> float:
    """Decode the last tokens of every sequence's context; return a step's median seconds."""
    seconds = []
    for position in range(context - WARM - n_steps, context):
        token = position * 7919 % model.config.vocab_size
        chunks = [Chunk(slot, [(token + slot) % model.config.vocab_size], position)
                  for slot in range(cache.n_slots)]  # fmt: skip
        start = time.perf_counter()
        batch = cache.batch(chunks)
        model.logits(model(batch, cache.layers)).cpu()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[WARM:])[n_steps // 2]
