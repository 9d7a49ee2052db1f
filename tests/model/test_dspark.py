"""DSpark against a dense drafter written for this test, and faults that must be seen."""

from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, GOLDEN, build, caches, hashed_tensor, in_chunks
from dspark_reference import Reference

from v4_ascend.config.inventory import inventory
from v4_ascend.config.model import DSparkConfig
from v4_ascend.model.dspark import Targets
from v4_ascend.ops import fp8_round_trip
from v4_ascend.runtime.kv_cache import Chunk, KVCache

TARGETS = (1, 2, 4)
SPARK = CONFIG.model_copy(
    update={
        "dspark": DSparkConfig(
            block_size=5, noise_token_id=500, target_layer_ids=TARGETS, markov_rank=16
        ),
        "compress_ratios": (*CONFIG.compress_ratios, 0, 0),
    }
)
TOKENS, NEXT = GOLDEN["tokens"], 77
TIGHT = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def model():
    return build(SPARK)


@pytest.fixture(scope="module")
def dense():
    return Reference({s.name: hashed_tensor(s, SPARK) for s in inventory(SPARK)}, SPARK)


@pytest.fixture(scope="module")
def means(model):
    """Of 300 tokens at once, what the streams behind each target layer are on average.

    The streams themselves are proven against the published graph's.
    """
    seen, cache = {}, caches(SPARK)
    with torch.inference_mode():
        model(
            cache.batch([Chunk(0, TOKENS[:300], 0)]),
            cache.layers,
            lambda layer, x: seen.update({layer: sum(x[:, j] for j in range(4)) / 4}),
        )
    return [seen[layer] for layer in TARGETS]


def take(model, cache, chunks, dspark=None):
    """One step: the network, and the drafter's keys of its tokens."""
    dspark, batch = dspark or model.dspark, cache.batch(chunks)
    targets = Targets(dspark.dspark, model.shard.layers)
    model(batch, cache.layers, targets.observe)
    dspark.take(targets.seen, batch, cache.layers[SPARK.n_layers :])


def fed(model, sizes, slot=0, cache=None):
    cache = cache or caches(SPARK)
    start = 0
    for size in sizes:
        take(model, cache, [Chunk(slot, TOKENS[start : start + size], start)])
        start += size
    return cache


def draft(model, cache, *turns):
    """Guesses behind each (slot, tokens in the caches, token)."""
    noise = [SPARK.dspark.noise_token_id] * (SPARK.dspark.block_size - 1)
    slots, starts = [t[0] for t in turns], [t[1] for t in turns]
    return model.draft_blocks(
        cache.block(slots, starts, [[t[2], *noise] for t in turns]), cache.layers
    )


def check(guesses, dense, means, *lengths, **how):
    for i, n in enumerate(lengths):
        ids, logits, confidence = dense.guesses([m[:n] for m in means], NEXT, **how)
        torch.testing.assert_close(guesses.logits[i], logits, **TIGHT)
        torch.testing.assert_close(guesses.confidence[i], confidence, **TIGHT)
        assert guesses.ids[i].tolist() == ids


@pytest.mark.parametrize("n", [1, 3, 33, 130, 258])
def test_every_guess_is_the_dense_drafters(model, dense, means, n):
    check(draft(model, fed(model, [n]), (0, n, NEXT)), dense, means, n)


@pytest.mark.parametrize(("n", "size"), [(35, 1), (140, 37), (140, 129)])
def test_prompts_in_chunks_of_any_size(model, dense, means, n, size):
    cache = fed(model, in_chunks(n, size), cache=caches(SPARK, max_chunk=size))
    check(draft(model, cache, (0, n, NEXT)), dense, means, n)


def test_a_ragged_batch_in_slots_out_of_order(model, dense, means):
    cache = caches(SPARK, n_slots=4)
    for slot, n in ((2, 40), (0, 129), (3, 5)):
        fed(model, [n], slot, cache)
    # One step for all of them: a prompt's end, one token, and one with guesses behind it.
    sizes = {2: (40, 20), 0: (129, 1), 3: (5, 4)}
    take(model, cache, [Chunk(s, TOKENS[a : a + n], a) for s, (a, n) in sizes.items()])
    guesses = draft(model, cache, (2, 60, NEXT), (0, 130, NEXT), (3, 6, NEXT))
    check(guesses, dense, means, 60, 130, 6)


def test_wrong_guesses_leave_nothing_behind(model, dense, means):
    """In the network's caches and the drafter's: five wrong tokens, across a CSA group's end."""
    cache = KVCache(
        SPARK,
        n_slots=1,
        max_model_len=512,
        max_chunk=64,
        kv_record="fp32",
        index_record="fp32",
        n_drafts=5,
    )
    fed(model, [62], cache=cache)
    for n in range(62, 66):
        draft(model, cache, (0, n, NEXT))
        take(model, cache, [Chunk(0, [TOKENS[n], 9, 8, 7, 6, 5], n)])
    check(draft(model, cache, (0, 66, NEXT)), dense, means, 66)


def test_a_slot_is_used_again_and_nothing_unwritten_is_read(model, dense, means):
    cache = caches(SPARK)
    for layer in cache.layers:
        layer.window.fill_(float("nan"))
    fed(model, [200], cache=cache)
    draft(model, cache, (0, 200, NEXT))
    fed(model, [2], cache=cache)
    check(draft(model, cache, (0, 2, NEXT)), dense, means, 2)


@pytest.mark.parametrize("length", [40, 128])
def test_a_block_may_go_on_behind_the_longest_request(model, dense, means, length):
    cache = caches(SPARK, max_model_len=length, max_chunk=length)
    fed(model, [length - 1], cache=cache)
    check(draft(model, cache, (0, length - 1, NEXT)), dense, means, length - 1)


def test_a_rank_without_tokens_serves_experts_alone(model):
    cache = caches(SPARK)
    guesses = model.draft_blocks(None, cache.layers)
    assert guesses.ids.shape == guesses.confidence.shape == (0, 5)
    assert not any(layer.window.any() for layer in cache.layers)


def test_its_keys_are_rounded_as_the_model_was_trained(model):
    sim = build(SPARK, quant_sim=True)
    cache = fed(sim, [20])
    assert draft(sim, cache, (0, 20, NEXT)).logits.isfinite().all()
    for layer in cache.layers[SPARK.n_layers :]:
        nope = layer.window.flatten(0, -2)[:25, : SPARK.head_dim - SPARK.rope_head_dim]
        assert nope.any()
        assert torch.equal(fp8_round_trip(nope, 64, 0), nope)


def causal(model, cache):
    laid_out = cache.block

    def block(*given):
        batch = laid_out(*given)
        behind = torch.arange(len(batch.seq_lens)) % 5 - 4
        return replace(batch, seq_lens=batch.seq_lens + behind.int())

    cache.block = block
    return draft(model, cache, (0, 140, NEXT))


def reversed_targets(model, cache):
    dspark = replace(
        model.dspark,
        dspark=SPARK.dspark.model_copy(update={"target_layer_ids": TARGETS[::-1]}),
    )
    take(model, cache, [Chunk(0, TOKENS[:140], 0)], dspark)
    return draft(model, cache, (0, 140, NEXT))


def no_prompt(model, cache):
    for layer in cache.layers[SPARK.n_layers :]:
        layer.window.zero_()
    take(model, cache, [Chunk(0, TOKENS[139:140], 139)])
    return draft(model, cache, (0, 140, NEXT))


def other_noise(model, cache):
    return model.draft_blocks(cache.block([0], [140], [[NEXT, 3, 3, 3, 3]]), cache.layers)


def one_position_early(model, cache):
    return draft(model, cache, (0, 139, NEXT))


FAULTS = (causal, reversed_targets, no_prompt, other_noise, one_position_early)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_faults_are_seen(model, dense, means, fault):
    guesses = fault(model, fed(model, [140]))
    with pytest.raises(AssertionError, match="not close"):
        check(guesses, dense, means, 140)


def test_a_correction_by_another_token_is_seen(model, dense, means):
    """By the guess it is to correct instead of the one before."""
    guesses = draft(model, fed(model, [140]), (0, 140, NEXT))
    with pytest.raises(AssertionError, match="not close"):
        check(guesses, dense, means, 140, previous=lambda before, said: int(said.argmax()))
