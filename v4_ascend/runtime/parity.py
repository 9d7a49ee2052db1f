"""Record a model's logits on given tokens: the interface everything is compared through."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from v4_ascend import __version__
from v4_ascend.backends import Backend, find_backend
from v4_ascend.checkpoint.folder import MANIFEST
from v4_ascend.checkpoint.manifest import Manifest
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import ConfigError
from v4_ascend.model.numerics import Dtype, Numerics, QuantSim
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import RECORDS, use_policy
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.load import Progress, load_model
from v4_ascend.runtime.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What to run, and how.

    Attributes:
        prefill: tokens of each sequence that go through prefill; the rest is decoded one at
            a time, teacher-forced.
        chunk: most tokens of a prefill step; None for the whole prompt at once.
        dtype: None follows the checkpoint.
        backend: whose kernels run, where its tensors live; `chip` is one of the backend's.
        kernels: None takes the references on the CPU backend, and kernels elsewhere.
        trace: also keep every layer's streams and every operator's outputs, see `trace`.
    """

    prefill: int
    chunk: int | None = None
    dtype: Dtype | None = None
    quant_sim: QuantSim = "auto"
    backend: str = "cpu"
    chip: str | None = None
    kernels: Literal["fast", "reference"] | None = None
    fallback: Literal["error", "reference"] = "error"
    trace: bool = False


def read_input_ids(file: Path, vocab_size: int) -> torch.Tensor:
    """Read ``input_ids`` int64 [n, s] from a safetensors file.

    Raises:
        ConfigError: not such a file, or ids outside the vocabulary.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as e:
        raise ConfigError(str(file), f"cannot be read as safetensors: {e}") from e
    ids = tensors.get("input_ids")
    if ids is None:
        raise ConfigError(str(file), f"has no input_ids, only {sorted(tensors)}")
    if ids.dtype != torch.int64 or ids.dim() != 2 or not ids.numel():
        raise ConfigError(
            str(file), f"input_ids is {ids.dtype} {list(ids.shape)}, must be int64 [n, s]"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ConfigError(
            str(file), f"input_ids has {int(ids.min())}..{int(ids.max())}, vocabulary: {vocab_size}"
        )
    return ids


def cache_records(
    backend: Backend,
    config: ModelConfig,
    numerics: Numerics,
    kernels: Literal["fast", "reference"],
) -> tuple[str, str]:
    """Return the record formats of kv and index caches.

    Plain rows for the references, and for a model whose rows are not as wide as the
    backend's format is made for.
    """
    plain = "fp32" if numerics.dtype == torch.float32 else "bf16"
    if kernels == "reference":
        return plain, plain
    kv, index = backend.records(plain, numerics.quant_sim)
    widths = ((kv, config.head_dim), (index, config.index_head_dim))
    kv, index = (n if RECORDS[n].row_dim in (None, width) else plain for n, width in widths)
    return kv, index


def sequence_logits(
    model: Transformer,
    cache: KVCache,
    token_ids: list[int],
    *,
    prefill: int,
    chunk: int,
    trace: Trace | None = None,
) -> torch.Tensor:
    """Return fp32 logits [s, vocab_size] of every position of one sequence, in slot 0."""
    logits, start = [], 0
    while start < len(token_ids):
        size = min(chunk, prefill - start) if start < prefill else 1
        batch = cache.batch([Chunk(0, token_ids[start : start + size], start)])
        with trace.step(start) if trace else nullcontext() as observe:
            logits.append(model.logits(model(batch, cache.layers, observe)).cpu())
        start += size
    return torch.cat(logits)


def record(
    checkpoint: Checkpoint, input_ids: torch.Tensor, how: Recording, progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Run every sequence and return ``logits`` fp32 [n, s, vocab_size], and metadata.

    With a trace, also what `Trace` kept of the first sequence.

    Raises:
        BackendUnavailableError: the backend's device or library is not here.
        ConfigError: prefill or chunk is out of range.
        CheckpointError: the checkpoint is not complete.
    """
    n, length = input_ids.shape
    if not 1 <= how.prefill <= length:
        raise ConfigError("--prefill", f"{how.prefill} must be between 1 and {length} tokens")
    chunk = how.prefill if how.chunk is None else how.chunk
    if chunk < 1:
        raise ConfigError("--chunk", f"{chunk} must be at least 1")
    backend = find_backend(how.backend)
    backend.require()
    backend.use_chip(how.chip)
    kernels = how.kernels or ("reference" if backend.name == "cpu" else "fast")
    numerics = Numerics.of(checkpoint.config, how.dtype, how.quant_sim)
    plain = "fp32" if numerics.dtype == torch.float32 else "bf16"
    records = cache_records(backend, checkpoint.config, numerics, kernels)
    policy = use_policy(backend=backend.name, kernels=kernels, fallback=how.fallback)
    logits = torch.empty(n, length, checkpoint.config.vocab_size)
    trace = Trace() if how.trace else None
    with torch.inference_mode(), policy:
        model = load_model(
            checkpoint,
            numerics,
            with_drafter=False,
            progress=lambda done, total: None,
            device=backend.device(),
        )
        for i, sequence in enumerate(input_ids.tolist()):
            cache = KVCache(
                checkpoint.config,
                n_slots=1,
                max_model_len=length,
                max_chunk=min(chunk, how.prefill),
                kv_record=records[0],
                index_record=records[1],
                device=backend.device(),
                min_page_rows=backend.min_page_rows if kernels == "fast" else 1,
            )
            logits[i] = sequence_logits(
                model,
                cache,
                sequence,
                prefill=how.prefill,
                chunk=chunk,
                trace=trace if i == 0 else None,
            )
            progress(i + 1, n)
    metadata = {
        "v4_ascend": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend.name,
        "proof": backend.proof() if kernels == "fast" else "executed",
        "chip": how.chip or "",
        "device": platform.processor() or platform.machine(),
        "kernels": kernels,
        "fallback": how.fallback,
        "records": ", ".join(records),
        "dtype": plain,
        "quant_sim": "on" if numerics.quant_sim else "off",
        "mode": json.dumps({"prefill": how.prefill, "chunk": how.chunk}),
        "checkpoint_digest": checkpoint.digest,
        "input_ids_digest": hashlib.sha256(input_ids.contiguous().numpy().tobytes()).hexdigest(),
    }
    metadata |= _conversion(checkpoint)
    tensors = {"logits": logits, "input_ids": input_ids} | (trace.tensors if trace else {})
    return tensors, metadata


def _conversion(checkpoint: Checkpoint) -> dict[str, str]:
    """Say what a converted checkpoint was made of, so that the two may be compared."""
    file = checkpoint.path / MANIFEST
    if not file.exists():
        return {}
    made = Manifest.read(file)
    return {"source_digest": made.source.digest, "format": made.format or ""}


def write_record(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a record whole or not at all."""
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        half.write_bytes(save(tensors, metadata=metadata))
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)
