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
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import store_rows, use_policy
from v4_ascend.runtime.bench_ops import Rates
from v4_ascend.runtime.graphs import decoding
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.load import load_model
from v4_ascend.runtime.parity import cache_records
from v4_ascend.runtime.step_costs import row_bytes, step_costs
from v4_ascend.runtime.workload import Workload

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
            cache = step = None
            if fitting:
                cache = filled_cache(config, records, batch, max(fitting), backend)
                step = decoding(model, cache, batch, backend.name)
            for context in sorted(contexts):
                costs = step_costs(model, records, Workload(batch, 1, context))
                floor = costs.floor(rates)
                counted = (costs.weight_bytes, costs.cache_bytes, costs.operations)
                if cache is None or step is None or context not in fitting:
                    why = _why_not(config, records, batch, context) or ""
                    yield Point(batch, context, 0.0, floor, *counted, why=why)
                    continue
                seconds = _time(model, cache, step, context, n_steps)
                yield Point(batch, context, seconds, floor, *counted)
            progress(number + 1, len(batches))


def _why_not(config: ModelConfig, records: tuple[str, str], batch: int, context: int) -> str | None:
    """Refuse caches of more than half of the memory: filling them would push the rest out."""
    kv, index = (row_bytes(config, records, n) for n in (0, 1))
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


def _time(
    model: Transformer,
    cache: KVCache,
    step: Callable[[Sequence[Chunk]], torch.Tensor],
    context: int,
    n_steps: int,
) -> float:
    """Decode the last tokens of every sequence's context; return a step's median seconds."""
    seconds = []
    for position in range(context - WARM - n_steps, context):
        token = position * 7919 % model.config.vocab_size
        chunks = [Chunk(slot, [(token + slot) % model.config.vocab_size], position)
                  for slot in range(cache.n_slots)]  # fmt: skip
        start = time.perf_counter()
        model.logits(step(chunks)).cpu()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[WARM:])[n_steps // 2]
