"""Captured steps give what steps give: with the CPU's recorder, and with one that runs them again.

What a GPU does in its place is run there; see docs/performance.md.
"""

import pytest
import torch
from conftest import CONFIG, caches

from v4_ascend.backends.cpu.recorder import record_calls
from v4_ascend.errors import CaptureError, ParityError
from v4_ascend.ops import use_policy
from v4_ascend.runtime.graphs import DecodeGraphs
from v4_ascend.runtime.kv_cache import Chunk

SIZES, N_SLOTS = (1, 2, 4), 5
HOWEVER_BATCHED = {"rtol": 0, "atol": 2e-5}  # as in test_any_chunking


def run_again(run):
    result = run()
    return result, lambda: result.copy_(run())


def without_calls(run):
    """Record calls, and let no operator be called in a replay: kernels have been chosen."""
    result, replay = record_calls(run)

    def none_called():
        def fail(op, *_):
            raise AssertionError(f"{op.name} was called in a replay")

        with use_policy(around=fail):
            replay()

    return result, none_called


@pytest.fixture(params=["reference", "fast"])
def recorder(request, golden_model):
    with use_policy(kernels=request.param):
        yield {"reference": run_again, "fast": without_calls}[request.param]


def prompts(cache, model, lengths):
    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, CONFIG.vocab_size, (n + 4,), generator=g).tolist() for n in lengths]
    for slot, (tokens, n) in enumerate(zip(ids, lengths, strict=True)):
        model(cache.batch([Chunk(slot, tokens[:n], 0)]), cache.layers)
    return ids


@pytest.mark.parametrize("lengths", [(9,), (40, 131), (250, 3, 127), (70, 200, 5, 127)])
@torch.inference_mode()
def test_a_replayed_step_is_the_step(golden_model, recorder, lengths):
    """Below and above what the indexer chooses from, at ends of blocks, padded and not."""
    plain, captured = (caches(CONFIG, n_slots=N_SLOTS) for _ in range(2))
    graphs = DecodeGraphs(golden_model, captured, SIZES, recorder)
    assert len(graphs) == 2 * len(SIZES)
    ids = prompts(plain, golden_model, lengths)
    prompts(captured, golden_model, lengths)
    for i in range(4):
        chunks = [Chunk(s, [ids[s][n + i]], n + i) for s, n in enumerate(lengths)]
        want = golden_model(plain.batch(chunks), plain.layers)
        torch.testing.assert_close(graphs.streams(chunks), want, **HOWEVER_BATCHED)


@torch.inference_mode()
def test_other_steps_are_not_replayed(golden_model, recorder):
    cache = caches(CONFIG, n_slots=N_SLOTS)
    graphs = DecodeGraphs(golden_model, cache, (1, 2), recorder)
    assert graphs.streams([Chunk(0, [1, 2], 0)]) is None
    assert graphs.streams([Chunk(slot, [1], 0) for slot in range(3)]) is None


@torch.inference_mode()
def test_a_replay_that_does_not_see_its_step_is_refused(golden_model):
    def frozen(run):
        return run(), lambda: None

    with pytest.raises(ParityError, match="captured step of 2 sequences differs"):
        DecodeGraphs(golden_model, caches(CONFIG, n_slots=N_SLOTS), (1, 2), frozen)


@torch.inference_mode()
def test_repeated_sequences_write_what_they_would_have_written(golden_model, recorder):
    plain, captured = (caches(CONFIG, n_slots=N_SLOTS) for _ in range(2))
    graphs = DecodeGraphs(golden_model, captured, (4,), recorder)
    for layer in captured.layers:  # what capturing wrote there
        for part in (layer.window, layer.compressed, layer.state, layer.index, layer.index_state):
            if part is not None:
                part.zero_()
    lengths = (126, 30, 127)
    ids = prompts(plain, golden_model, lengths)
    prompts(captured, golden_model, lengths)
    chunks = [Chunk(s, [ids[s][n]], n) for s, n in enumerate(lengths)]
    golden_model(plain.batch(chunks), plain.layers)
    graphs.streams(chunks)
    for a, b in zip(plain.layers, captured.layers, strict=True):
        torch.testing.assert_close(b.window, a.window, **HOWEVER_BATCHED)
        if a.compressed is not None:
            torch.testing.assert_close(b.compressed, a.compressed, **HOWEVER_BATCHED)
            torch.testing.assert_close(b.state[:3], a.state[:3], **HOWEVER_BATCHED)


@torch.inference_mode()
def test_references_cannot_be_recorded(golden_model):
    """They look for the rows that are written, whose number a recording would keep for ever."""
    cache = caches(CONFIG, n_slots=N_SLOTS)
    with use_policy(kernels="reference"), pytest.raises(CaptureError, match="depends on values"):
        DecodeGraphs(golden_model, cache, (1,), record_calls)
