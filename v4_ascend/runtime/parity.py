"""Record a model's logits on given tokens: the interface everything is compared through."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from v4_ascend import __version__
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.errors import ConfigError
from v4_ascend.model.numerics import Dtype, Numerics, QuantSim
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import use_policy
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.load import Progress, load_model


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What to run, and how.

    Attributes:
        prefill: tokens of each sequence that go through prefill; the rest is decoded one at
            a time, teacher-forced.
        chunk: most tokens of a prefill step; None for the whole prompt at once.
        dtype: None follows the checkpoint.
    """

    prefill: int
    chunk: int | None = None
    dtype: Dtype | None = None
    quant_sim: QuantSim = "auto"


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


def sequence_logits(
    model: Transformer, cache: KVCache, token_ids: list[int], *, prefill: int, chunk: int
) -> torch.Tensor:
    """Return fp32 logits [s, vocab_size] of every position of one sequence, in slot 0."""
    logits, start = [], 0
    while start < len(token_ids):
        size = min(chunk, prefill - start) if start < prefill else 1
        batch = cache.batch([Chunk(0, token_ids[start : start + size], start)])
        logits.append(model.head(model(batch, cache.layers)))
        start += size
    return torch.cat(logits)


def record(
    checkpoint: Checkpoint, input_ids: torch.Tensor, how: Recording, progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Run every sequence and return ``logits`` fp32 [n, s, vocab_size], and metadata.

    The references run, in their order, so that a record depends on nothing but its inputs.

    Raises:
        ConfigError: prefill or chunk is out of range.
        CheckpointError: the checkpoint is not complete.
    """
    n, length = input_ids.shape
    if not 1 <= how.prefill <= length:
        raise ConfigError("--prefill", f"{how.prefill} must be between 1 and {length} tokens")
    chunk = how.prefill if how.chunk is None else how.chunk
    if chunk < 1:
        raise ConfigError("--chunk", f"{chunk} must be at least 1")
    numerics = Numerics.of(checkpoint.config, how.dtype, how.quant_sim)
    model = load_model(checkpoint, numerics, with_mtp=False, progress=lambda done, total: None)
    plain = "fp32" if numerics.dtype == torch.float32 else "bf16"
    logits = torch.empty(n, length, checkpoint.config.vocab_size)
    with torch.inference_mode(), use_policy(kernels="reference"):
        for i, sequence in enumerate(input_ids.tolist()):
            cache = KVCache(
                checkpoint.config,
                n_slots=1,
                max_model_len=length,
                max_chunk=min(chunk, how.prefill),
                kv_record=plain,
                index_record=plain,
            )
            logits[i] = sequence_logits(model, cache, sequence, prefill=how.prefill, chunk=chunk)
            progress(i + 1, n)
    metadata = {
        "v4_ascend": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": "cpu",
        "device": platform.processor() or platform.machine(),
        "kernels": "reference",
        "dtype": plain,
        "quant_sim": "on" if numerics.quant_sim else "off",
        "mode": json.dumps({"prefill": how.prefill, "chunk": how.chunk}),
        "checkpoint_digest": checkpoint.digest,
        "input_ids_digest": hashlib.sha256(input_ids.contiguous().numpy().tobytes()).hexdigest(),
    }
    return {"logits": logits}, metadata


def write_record(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a record whole or not at all."""
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        half.write_bytes(save(tensors, metadata=metadata))
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)
