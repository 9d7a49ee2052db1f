"""Small models with hashed weights, and ways to run them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from v4_ascend.config.inventory import inventory
from v4_ascend.config.model import ModelConfig
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import use_policy
from v4_ascend.runtime.kv_cache import Chunk, KVCache

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_tiny_model.json").read_text())
NOT_OURS = {"max_batch_size", "max_seq_len", "dtype", "scale_dtype"}
CONFIG = ModelConfig(
    **{k: v for k, v in GOLDEN["config"].items() if k not in NOT_OURS}, dtype="fp32"
)
M32 = np.uint64(0xFFFFFFFF)


def _hashed(name, n):
    """32-bit words of a tensor, as golden_tiny_model.json defines them."""
    h = 2166136261
    for byte in name.encode():
        h = ((h ^ byte) * 16777619) & 0xFFFFFFFF
    x = (np.uint64(h) + np.arange(n, dtype=np.uint64) * np.uint64(2654435761)) & M32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & M32
    return x ^ (x >> np.uint64(16))


def hashed_tensor(spec, config):
    x = _hashed(spec.name, int(np.prod(spec.shape)))
    if spec.dtype == "I64":
        n = config.n_routed_experts
        x = x.reshape(spec.shape)
        first = x[:, 0] % n
        return torch.from_numpy(
            np.stack([first, (first + 1 + x[:, 1] % (n - 1)) % n], 1).astype(np.int64)
        )
    u = torch.from_numpy(x / 2.0**32 - 0.5).view(spec.shape)
    name = spec.name
    if name.endswith("norm.weight"):
        u = 1 + 0.2 * u
    elif name.endswith("_scale"):
        u = torch.full(spec.shape, 0.5)
    elif name.endswith(("ape", "embed.weight")):
        u = 2 * u
    elif not name.endswith(("_base", "attn_sink", "gate.bias")):
        u = u * (12 / spec.shape[-1]) ** 0.5
    return u.float()


def build(config, *, quant_sim=False, with_drafter=True, change=lambda name, tensor: tensor):
    specs = {s.name: s for s in inventory(config)}
    numerics = Numerics(torch.float32, quant_sim)
    return Transformer.read(
        lambda name: change(name, hashed_tensor(specs[name], config)),
        config,
        numerics,
        with_drafter=with_drafter,
    )


def caches(config, *, n_slots=1, max_model_len=512, max_chunk=512):
    return KVCache(
        config,
        n_slots=n_slots,
        max_model_len=max_model_len,
        max_chunk=max_chunk,
        kv_record="fp32",
        index_record="fp32",
    )


def run(model, cache, sizes, token_ids, slot=0):
    """Logits of every position, the sequence cut into chunks of the given sizes."""
    out, start = [], 0
    for size in sizes:
        batch = cache.batch([Chunk(slot, token_ids[start : start + size], start)])
        out.append(model.head(model(batch, cache.layers)))
        start += size
    assert start == len(token_ids)
    return torch.cat(out)


def in_chunks(n, size):
    return [min(size, n - i) for i in range(0, n, size)]


@pytest.fixture(scope="session")
def golden_model():
    return build(CONFIG)


@pytest.fixture(autouse=True)
def _no_grad():
    # The references are what is proven here; kernels are proven against them.
    with torch.inference_mode(), use_policy(kernels="reference"):
        yield
