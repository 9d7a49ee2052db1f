"""The computed inventory against the published checkpoints."""

import json
from collections import Counter
from pathlib import Path

import pytest

from v4_ascend.config.inventory import inventory, n_shards, shard_of
from v4_ascend.config.model import ModelConfig

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(params=["flash", "pro"])
def published(request):
    patterns = json.loads((DATA / f"tensor_patterns_{request.param}.json").read_text())
    config = ModelConfig.read(DATA / f"v4_{request.param}_config.json")
    return patterns, config, inventory(config)


def test_totals(published):
    patterns, _, tensors = published
    assert len(tensors) == patterns["tensors"]
    assert sum(t.nbytes for t in tensors) == patterns["tensor_bytes"]
    assert Counter(t.dtype for t in tensors) == patterns["dtype_counts"]


def test_the_totals_are_the_published_ones():
    totals = {}
    for name in ("v4_flash", "v4_pro", "v4_flash_0731"):
        tensors = inventory(ModelConfig.read(DATA / f"{name}_config.json"))
        totals[name] = (len(tensors), sum(t.nbytes for t in tensors))
    assert totals == {
        "v4_flash": (69187, 159609485896),
        "v4_pro": (145116, 864704792696),
        "v4_flash_0731": (72317, 166878536440),
    }


def test_shards(published):
    patterns, config, tensors = published
    counts, nbytes = Counter(), Counter()
    for t in tensors:
        counts[shard_of(t.name, config)] += 1
        nbytes[shard_of(t.name, config)] += t.nbytes
    assert n_shards(config) == patterns["n_shards"]
    for shard in patterns["shards"]:
        assert counts[shard["shard"]] == shard["tensors"]
        assert nbytes[shard["shard"]] == shard["tensor_bytes"]


def test_every_published_pattern_has_its_count_dtype_and_shape(published):
    patterns, config, tensors = published
    got = Counter((_pattern(t.name), t.dtype, t.shape) for t in tensors)
    want = Counter()
    for p in patterns["patterns"]:
        want[(_pattern(p["name"]), p["dtype"], tuple(p["shape"]))] += p["count"]
    assert got == want


def _pattern(name):
    """The name with every layer, expert or stage number replaced."""
    return ".".join("*" if p.isdigit() or p.startswith("{") else p for p in name.split("."))


def test_an_fp32_checkpoint_has_no_scales_and_nothing_narrow():
    config = ModelConfig.read(DATA / "v4_flash_config.json")
    plain = config.model_copy(update={"quantization": None, "expert_dtype": None, "dtype": "fp32"})
    tensors = inventory(plain)
    assert {t.dtype for t in tensors} == {"F32", "I64"}
    assert not [t for t in tensors if t.name.endswith(".scale")]


def test_base_checkpoints_have_fp8_experts_and_fp32_scales():
    config = ModelConfig.read(DATA / "v4_flash_config.json")
    base = inventory(config.model_copy(update={"expert_dtype": "fp8"}))
    by_name = {t.name: t for t in base}
    expert = "layers.3.ffn.experts.7.w1"
    assert (by_name[f"{expert}.weight"].dtype, by_name[f"{expert}.weight"].shape) == (
        "F8_E4M3",
        (2048, 4096),
    )
    assert (by_name[f"{expert}.scale"].dtype, by_name[f"{expert}.scale"].shape) == ("F32", (16, 32))
