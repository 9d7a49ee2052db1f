"""A checkpoint whose files have their true headers and sizes, and holes for data.

The headers are those of the official layout, so that what reads headers alone can be tried on a
real model without its weights. Every value is zero; the files take next to no space.
"""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path

from v4_ascend.checkpoint.folder import INDEX
from v4_ascend.config.inventory import TensorSpec, inventory, n_shards, shard_of
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import ConfigError


def write_sparse(config: ModelConfig, out: Path) -> None:
    """Write a checkpoint of `config` to the new folder `out`.

    Raises:
        ConfigError: `out` is there, or cannot be written.
    """
    shards: dict[int, list[TensorSpec]] = defaultdict(list)
    for spec in inventory(config):
        shards[shard_of(spec.name, config)].append(spec)
    weight_map: dict[str, str] = {}
    try:
        out.mkdir(parents=True)
        for number, specs in shards.items():
            name = f"model-{number:05d}-of-{n_shards(config):05d}.safetensors"
            _write(out / name, specs)
            weight_map |= dict.fromkeys((s.name for s in specs), name)
        total = sum(s.nbytes for specs in shards.values() for s in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index), encoding="utf-8")
        text = json.dumps(config.to_hf(), indent=2) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(str(out), f"cannot be written: {e.strerror}") from e


def _write(file: Path, specs: list[TensorSpec]) -> None:
    at, header = 0, {}
    for s in specs:
        offsets = [at, at + s.nbytes]
        header[s.name] = {"dtype": s.dtype, "shape": s.shape, "data_offsets": offsets}
        at += s.nbytes
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
