"""Stages run one after the other in one process: the four faults that vllm-ascend PR 9473 fixed.

Each has a test of its name that puts it in, or looks for what it broke. And torchtitan PR 4782's:
hash-routed layers need the token ids wherever they are.
"""

import dataclasses

import pytest
import torch
from conftest import CONFIG, caches, hashed_tensor

from v4_ascend.config.inventory import inventory
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard
from v4_ascend.model.transformer import Transformer
from v4_ascend.runtime.kv_cache import Chunk

SPECS = {s.name: s for s in inventory(CONFIG)}
CUTS = [1, CONFIG.n_layers // 2, CONFIG.n_layers - 1]


def part(first, end):
    asked = []

    def source(name):
        asked.append(name)
        return hashed_tensor(SPECS[name], CONFIG)

    shard = dataclasses.replace(Shard.whole(CONFIG), layers=(first, end))
    numerics = Numerics(torch.float32, quant_sim=False)
    return Transformer.read(source, CONFIG, numerics, with_drafter=False, shard=shard), asked


def whole_and_staged(golden_model, cut, boundary=lambda back, streams: streams):
    """Return logits of one process and of two stages, with `boundary` between them."""
    ids = torch.randint(0, CONFIG.vocab_size, (70,), generator=torch.Generator().manual_seed(2))
    chunks = [Chunk(0, ids.tolist(), 0)]
    whole, split = caches(CONFIG), caches(CONFIG)
    want = golden_model.logits(golden_model(whole.batch(chunks), whole.layers))
    (front, _), (back, _) = part(0, cut), part(cut, CONFIG.n_layers)
    batch = split.batch(chunks)
    streams = front(batch, split.layers[:cut])
    assert streams.shape == (70, CONFIG.hc_mult, CONFIG.dim)
    last = back(batch, split.layers[cut:], streams=boundary(back, streams))
    return want, back.logits(last)


def as_streams(x):
    return x.unsqueeze(1).repeat(1, CONFIG.hc_mult, 1)


@pytest.mark.parametrize("cut", CUTS)
def test_two_stages_are_the_whole(golden_model, cut):
    want, got = whole_and_staged(golden_model, cut)
    assert torch.equal(got, want)


def test_pr_9473_a_boundary_without_the_streams_dimension_is_noticed(golden_model):
    want, got = whole_and_staged(golden_model, 3, lambda back, x: as_streams(x.sum(1)))
    assert float((got - want).abs().max()) > 1e-2


def test_pr_9473_streams_that_every_stage_expands_again_are_noticed(golden_model):
    want, got = whole_and_staged(golden_model, 3, lambda back, x: as_streams(x[:, 0]))
    assert float((got - want).abs().max()) > 1e-2


def test_pr_9473_hc_head_at_a_boundary_is_noticed(golden_model):
    want, got = whole_and_staged(golden_model, 3, lambda back, x: as_streams(back.head.collapse(x)))
    assert float((got - want).abs().max()) > 1e-2


@pytest.mark.parametrize("cut", CUTS)
def test_pr_9473_a_stage_asks_for_no_sink_of_a_layer_that_is_elsewhere(cut):
    for first, end in ((0, cut), (cut, CONFIG.n_layers)):
        _, asked = part(first, end)
        sinks = [n for n in asked if n.endswith("attn_sink")]
        assert sinks == [f"layers.{n}.attn.attn_sink" for n in range(first, end)]


@pytest.mark.parametrize("cut", CUTS)
def test_a_stage_reads_its_layers_and_its_end_alone(cut):
    (front, before), (back, behind) = part(0, cut), part(cut, CONFIG.n_layers)
    assert not set(before) & set(behind)
    assert set(before) | set(behind) == {n for n in SPECS if not n.startswith("mtp.")}
    assert {n.split(".")[1] for n in behind if n.startswith("layers.")} == {
        str(n) for n in range(cut, CONFIG.n_layers)
    }
    with pytest.raises(ValueError, match="only the last stage has the head"):
        front.logits(front.no_streams())
    with pytest.raises(ValueError, match="only the first stage embeds"):
        back.embedded(torch.tensor([1]))


def test_a_hash_routed_layer_behind_a_boundary_sees_the_token_ids():
    """The cut lies before a hash-routed layer: other ids, other experts, other streams."""
    assert CONFIG.n_hash_layers > 1
    back, _ = part(1, CONFIG.n_layers)
    streams = torch.randn(5, CONFIG.hc_mult, CONFIG.dim, generator=torch.Generator().manual_seed(1))
    outs = []
    for ids in ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5]):
        cache = caches(CONFIG)
        outs.append(back(cache.batch([Chunk(0, ids, 0)]), cache.layers[1:], streams=streams))
    assert not torch.equal(outs[0], outs[1])
