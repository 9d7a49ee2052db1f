"""A step laid out in place is the step laid out anew, number by number."""

import random

import pytest
import torch
from conftest import CONFIG, caches

from v4_ascend.model.batch import Batch, CompressedRows
from v4_ascend.runtime.decode_layout import DecodeLayout
from v4_ascend.runtime.kv_cache import Chunk

N_SLOTS = 5


def _same(got, want, at=""):
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want), at
    elif isinstance(want, tuple):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            _same(a, b, f"{at}[{i}]")
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            _same(got[key], want[key], f"{at}[{key}]")
    elif isinstance(want, (Batch, CompressedRows)):
        for name in want.__dataclass_fields__:
            if name != "max_visible":  # the host asks it before a step is chosen
                _same(getattr(got, name), getattr(want, name), f"{at}.{name}")


@pytest.mark.parametrize("size", [1, 3, 5])
@torch.inference_mode()
def test_any_step_after_any_other(size):
    rng = random.Random(size)
    cache = caches(CONFIG, n_slots=N_SLOTS, max_model_len=1024)
    laid_out = cache.batch([Chunk(slot, [0], 0) for slot in range(size)])
    layout = DecodeLayout(cache, laid_out)
    starts = [rng.randrange(1000) for _ in range(N_SLOTS)]
    slots = rng.sample(range(N_SLOTS), size)
    for step in range(200):
        if step % 20 == 0:
            slots = rng.sample(range(N_SLOTS), size)
        if step % 50 == 0:  # a prefix of another sequence
            pages = rng.sample(range(cache.n_pages), 2)
            cache.place(rng.randrange(N_SLOTS), 0, pages)
        chunks = [Chunk(slot, [rng.randrange(CONFIG.vocab_size)], starts[slot]) for slot in slots]
        layout.fill(chunks)
        _same(laid_out, cache.layout(chunks))
        for slot in slots:
            starts[slot] = (starts[slot] + 1) % 1024
    one_completes_a_row = [Chunk(slots[0], [7], 127), *(Chunk(s, [7], 5) for s in slots[1:])]
    layout.fill(one_completes_a_row)
    _same(laid_out, cache.layout(one_completes_a_row))


@torch.inference_mode()
def test_a_sequence_that_is_too_long_is_refused():
    cache = caches(CONFIG, max_model_len=256)
    layout = DecodeLayout(cache, cache.batch([Chunk(0, [0], 0)]))
    with pytest.raises(ValueError, match="end by 256"):
        layout.fill([Chunk(0, [0], 256)])
