"""Checkpoints with random values and everything else official: names, dtypes, shards."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from v4_ascend.chat.tokenizer import write_byte_tokenizer
from v4_ascend.checkpoint.folder import INDEX
from v4_ascend.config.inventory import TensorSpec, inventory, n_shards, shard_of
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import ConfigError
from v4_ascend.ops.formats import quantize_fp4, quantize_fp8_block, scale_to_float

Format = Literal["fp8", "bf16", "fp32"]


def in_format(config: ModelConfig, format: Format) -> ModelConfig:
    """Return the configuration of the same model stored as `format` (fp8 has FP4 experts)."""
    quantization = "fp8" if format == "fp8" else None
    expert_dtype = (config.expert_dtype or "fp4") if quantization else None
    changes = {"quantization": quantization, "expert_dtype": expert_dtype}
    dtype = "fp32" if format == "fp32" else "bf16"
    return config.model_copy(update={**changes, "dtype": dtype})


def write_synthetic(
    config: ModelConfig,
    out: Path,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a checkpoint of `config` to the folder `out`, whole or not at all.

    A tensor's values depend on the seed and its name alone. One shard is in memory at a
    time; `progress` sees shards done and in all.

    Raises:
        ConfigError: `out` is taken or cannot be written, the disk is too small for the
            checkpoint, or the vocabulary for its tokenizer.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(str(out), "exists and is not empty; give a new folder or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _require_space(out, sum(s.nbytes for s in inventory(config)))
        half = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as e:
        raise ConfigError(str(out), f"cannot be written: {e.strerror}") from e
    try:
        _write_shards(config, half, seed, progress)
        _write_json(half / "config.json", config.to_hf())
        _write_json(half / "generation_config.json", _generation(config))
        write_byte_tokenizer(half, config.vocab_size)
        if out.exists():
            out.rmdir()
        half.chmod(0o755)  # mkdtemp makes it private; a checkpoint is not
        half.rename(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _require_space(out: Path, nbytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise ConfigError(str(out), f"needs {nbytes:,} bytes, its disk has {free:,} free")


def _generation(config: ModelConfig) -> dict[str, object]:
    return {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
    }


def _write_shards(
    config: ModelConfig, folder: Path, seed: int, progress: Callable[[int, int], None]
) -> None:
    total, nbytes = n_shards(config), 0
    weight_map: dict[str, str] = {}
    for shard, specs in groupby(inventory(config), lambda s: shard_of(s.name, config)):
        name = f"model-{shard:05d}-of-{total:05d}.safetensors"
        tensors = dict(_tensors(list(specs), config, seed))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, name)
        nbytes += sum(t.nbytes for t in tensors.values())
        progress(shard, total)
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tensors(
    specs: list[TensorSpec], config: ModelConfig, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    by_name = {s.name: s for s in specs}
    for spec in specs:
        if spec.name.endswith(".scale"):
            continue  # comes with its weight
        scale = by_name.get(spec.name.removesuffix("weight") + "scale")
        if scale is None or spec.dtype not in ("I8", "F8_E4M3"):
            yield spec.name, _plain(spec, config, seed)
            continue
        shape = (spec.shape[0], spec.shape[1] * (2 if spec.dtype == "I8" else 1))
        value = _linear(_generator(spec.name, seed), shape)
        quantize = quantize_fp4 if spec.dtype == "I8" else quantize_fp8_block
        weight, scales = quantize(value)
        yield spec.name, weight
        yield scale.name, scale_to_float(scales) if scale.dtype == "F32" else scales


def _generator(name: str, seed: int) -> torch.Generator:
    word = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(word, "big") % 2**63)


def _uniform(g: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=g).sub_(0.5)


def _linear(g: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Unit variance of outputs for unit variance of inputs."""
    return _uniform(g, shape).mul_((12 / shape[-1]) ** 0.5)


def _plain(spec: TensorSpec, config: ModelConfig, seed: int) -> torch.Tensor:
    g, name = _generator(spec.name, seed), spec.name
    if spec.dtype == "I64":
        order = torch.rand(spec.shape[0], config.n_routed_experts, generator=g).argsort(-1)
        return order[:, : spec.shape[1]].contiguous()
    if name.endswith("norm.weight"):
        value = 1 + 0.2 * _uniform(g, spec.shape)
    elif name.endswith("_scale"):
        value = torch.full(spec.shape, 0.5)
    elif name.endswith(("_base", "attn_sink", "gate.bias")):
        value = _uniform(g, spec.shape)
    elif name.endswith(("ape", "embed.weight")):
        value = 2 * _uniform(g, spec.shape)
    else:
        value = _linear(g, spec.shape)
    return value.to(torch.bfloat16 if spec.dtype == "BF16" else torch.float32)
