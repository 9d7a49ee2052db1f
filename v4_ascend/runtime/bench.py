"""Tokens per second of a checkpoint on a backend, beside Hugging Face transformers if asked.

Both sides run in one process on the same weights and tokens, in turns, so that what else the
machine does hits both; the best round counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from v4_ascend.backends import Backend
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.errors import BackendUnavailableError, ConfigError
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import use_policy
from v4_ascend.runtime import workload
from v4_ascend.runtime.bench_ops import Rates, measure_rates
from v4_ascend.runtime.graphs import decoding
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.load import load_model
from v4_ascend.runtime.op_workloads import Unit
from v4_ascend.runtime.parity import cache_records
from v4_ascend.runtime.step_costs import step_costs


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed: a prompt in steps of `chunk` tokens, then tokens decoded one at a time.

    Of `batch` prompts each is prefilled by itself, and a step decodes a token for each.
    """

    prompt: int
    decode: int
    rounds: int
    chunk: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Speed:
    """The best round of one side, tokens per second."""

    who: str
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Speeds:
    """Both sides, ours first, and what no implementation could exceed at the measured rates.

    Attributes:
        unit: of the products that the floor counts with.
    """

    sides: list[Speed]
    floor: Speed
    rates: Rates
    unit: Unit


# Runs one round and returns the seconds of prefill and of decode.
Round = Callable[[], tuple[float, float]]


def bench(
    checkpoint: Checkpoint,
    backend: Backend,
    work: Workload,
    *,
    against_transformers: bool,
    progress: Callable[[int, int], None],
) -> Speeds:
    """Time both sides, and what the machine can do.

    Raises:
        BackendUnavailableError: transformers is not installed.
        ConfigError: transformers cannot read a quantised checkpoint of ours.
    """
    if work.prompt + work.decode > checkpoint.config.max_seq_len:
        raise ConfigError("--prompt", f"is longer than {checkpoint.config.max_seq_len} tokens")
    g = torch.Generator().manual_seed(0)
    n = work.prompt + work.decode
    ids = torch.randint(0, checkpoint.config.vocab_size, (work.batch, n), generator=g)
    numerics = Numerics.of(checkpoint.config, None, "auto")
    records = cache_records(backend, checkpoint.config, numerics, "fast")
    with torch.inference_mode(), use_policy(backend=backend.name):
        model = load_model(
            checkpoint,
            numerics,
            with_drafter=False,
            progress=lambda done, total: None,
            device=backend.device(),
        )
        sides = {f"v4-ascend, {backend.name}": _ours(model, records, backend, work, ids)}
        if against_transformers:
            sides["transformers"] = _transformers(checkpoint, work, ids)
        rates = measure_rates(backend.device())
        best = dict.fromkeys(sides, (float("inf"), float("inf")))
        for number in range(work.rounds + 1):
            for who, run in sides.items():
                took = run()
                if number:  # the first warms up
                    prefill, decode = zip(best[who], took, strict=True)
                    best[who] = (min(prefill), min(decode))
            rates = rates.or_faster(measure_rates(backend.device()))
            progress(number + 1, work.rounds + 1)
    b = work.batch
    speeds = [Speed(who, b * work.prompt / p, b * work.decode / d) for who, (p, d) in best.items()]
    prompt = step_costs(model, records, workload.Workload(1, work.prompt, 0))
    middle = workload.Workload(b, 1, work.prompt + work.decode // 2)
    token = step_costs(model, records, middle)
    floor = Speed("floor", work.prompt / prompt.floor(rates), b / token.floor(rates))
    return Speeds(speeds, floor, rates, prompt.unit)


def _ours(
    model: Transformer,
    records: tuple[str, str],
    backend: Backend,
    work: Workload,
    ids: torch.Tensor,
) -> Round:
    kv, index = records
    cache = KVCache(
        model.config,
        n_slots=work.batch,
        max_model_len=ids.shape[1],
        max_chunk=work.chunk,
        kv_record=kv,
        index_record=index,
        device=backend.device(),
        min_page_rows=backend.min_page_rows,
    )
    tokens = ids.tolist()
    streams = decoding(model, cache, work.batch, backend.name)

    def step(slots: range, begin: int, end: int) -> torch.Tensor:
        chunks = [Chunk(slot, tokens[slot][begin:end], begin) for slot in slots]
        return model.logits(streams(chunks)[-len(slots) :]).cpu()

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        for slot in range(work.batch):
            for begin in range(0, work.prompt, work.chunk):
                step(range(slot, slot + 1), begin, min(begin + work.chunk, work.prompt))
        middle = time.perf_counter()
        for position in range(work.prompt, ids.shape[1]):
            step(range(work.batch), position, position + 1)
        return middle - start, time.perf_counter() - middle

    return run


def _transformers(checkpoint: Checkpoint, work: Workload, ids: torch.Tensor) -> Round:
    model = load_transformers(checkpoint)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        out = model(ids[:, : work.prompt], use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for position in range(work.prompt, ids.shape[1]):
            out = model(
                ids[:, position : position + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
        return middle - start, time.perf_counter() - middle

    return run


def load_transformers(checkpoint: Checkpoint) -> Any:
    """Return the same network as Hugging Face transformers has it, eager.

    Raises:
        BackendUnavailableError: transformers is not installed.
        ConfigError: it cannot read a quantised checkpoint of ours.
    """
    if checkpoint.config.quantization is not None:
        raise ConfigError("--against", "transformers reads ours with --format fp32 or bf16 only")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise BackendUnavailableError(
            "--against transformers: not installed (pip install 'v4-ascend[dev]')"
        ) from e
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager")
    return model.eval()
