"""A sequence gives the same logits however it is cut, batched or placed."""

from itertools import zip_longest

import pytest
import torch
from conftest import CONFIG, GOLDEN, caches, in_chunks, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from v4_ascend.runtime.kv_cache import Chunk

TOKENS = GOLDEN["tokens"]
N = 140


@pytest.fixture(scope="module")
def whole(golden_model):
    with torch.inference_mode():
        return run(golden_model, caches(CONFIG), [300], TOKENS)


@pytest.mark.parametrize("chunk", [1, 7, 50, 64, 129])
def test_chunks_of_any_size(golden_model, whole, chunk):
    got = run(golden_model, caches(CONFIG, max_chunk=chunk), in_chunks(300, chunk), TOKENS)
    torch.testing.assert_close(got, whole, rtol=0, atol=2e-5)


def cuts(draw_sizes):
    sizes, left = [], N
    for size in draw_sizes:
        if left:
            sizes.append(min(size, left))
            left -= sizes[-1]
    return sizes + ([left] if left else [])


def _holds_at_any_chunking(golden_model, whole, sizes):
    cache = caches(CONFIG, max_model_len=N, max_chunk=N)
    got = run(golden_model, cache, cuts(sizes), TOKENS[:N])
    torch.testing.assert_close(got, whole[:N], rtol=0, atol=2e-5)


SLOTS = 25
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=8)
OF_SLOT = st.lists(SIZES, min_size=SLOTS, max_size=SLOTS, unique_by=tuple)
FIXTURE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE, derandomize=True)
@given(sizes=SIZES)
def test_random_chunkings(golden_model, whole, sizes):
    _holds_at_any_chunking(golden_model, whole, sizes)


@pytest.mark.slow
@settings(
    max_examples=1000 // SLOTS,
    deadline=None,
    suppress_health_check=FIXTURE,
    derandomize=True,
)
@given(of_slot=OF_SLOT)
def test_a_thousand_random_chunkings(golden_model, whole, of_slot):
    """Many beside each other: a step has a chunk of every sequence that has tokens left."""
    cache = caches(CONFIG, n_slots=SLOTS, max_model_len=N, max_chunk=N)
    logits = [[] for _ in of_slot]
    starts = [0] * SLOTS
    for sizes in zip_longest(*map(cuts, of_slot), fillvalue=0):
        stops = [start + size for start, size in zip(starts, sizes, strict=True)]
        slots = [slot for slot in range(SLOTS) if sizes[slot]]
        chunks = [Chunk(i, TOKENS[starts[i] : stops[i]], starts[i]) for i in slots]
        found = golden_model.head(golden_model(cache.batch(chunks), cache.layers))
        for slot, part in zip(slots, found.split([sizes[i] for i in slots]), strict=True):
            logits[slot].append(part)
        starts = stops
    for of_sequence in logits:
        torch.testing.assert_close(torch.cat(of_sequence), whole[:N], rtol=0, atol=2e-5)


def test_a_ragged_batch_is_each_sequence_alone(golden_model, whole):
    """Prefill, a chunk and decode in one step, in slots out of order."""
    cache = caches(CONFIG, n_slots=4)
    starts = {2: 0, 0: 130, 3: 67}
    for slot, start in starts.items():
        if start:
            run(golden_model, cache, [start], TOKENS[:start], slot=slot)
    sizes = {2: 150, 0: 1, 3: 66}
    chunks = [Chunk(s, TOKENS[starts[s] : starts[s] + sizes[s]], starts[s]) for s in starts]
    got = golden_model.head(golden_model(cache.batch(chunks), cache.layers))
    want = torch.cat([whole[starts[s] : starts[s] + sizes[s]] for s in starts])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_trap_t22_a_short_prompt_after_a_long_one_in_its_slot_is_as_in_a_fresh_model(
    golden_model, whole
):
    cache = caches(CONFIG)
    run(golden_model, cache, [200], TOKENS[100:300])
    got = run(golden_model, cache, [3], TOKENS[:3])
    torch.testing.assert_close(got, whole[:3], rtol=0, atol=2e-5)


def test_uninitialised_caches_are_never_read(golden_model, whole):
    cache = caches(CONFIG)
    for layer in cache.layers:
        for tensor in (layer.window, layer.compressed, layer.state, layer.index, layer.index_state):
            if tensor is not None:
                tensor.fill_(float("nan"))
    got = run(golden_model, cache, [5, 124, 1, 20], TOKENS[:150])
    assert got.isfinite().all()


def test_a_chunk_longer_than_the_ring_is_refused():
    cache = caches(CONFIG, max_chunk=8)
    with pytest.raises(ValueError, match=r"tokens 0\.\.9 must be at most 8"):
        cache.batch([Chunk(0, TOKENS[:9], 0)])
