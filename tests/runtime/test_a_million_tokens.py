"""The last tokens of a full context: rows addressed by their place, chosen and weighed exactly."""

import json
import resource

import pytest
import torch
from layouts import write_tiny

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.config.presets import preset_path
from v4_ascend.model.numerics import Numerics
from v4_ascend.ops import use_policy
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.load import load_model
from v4_ascend.supernode.cache import BLOCK_TOKENS

LENGTH = 2**20
LAST = 300
CHANGES = {"index_n_heads": 4, "compress_ratios": [0, 128, 4, 0], "num_hidden_layers": 3}
MEMORY = 2e9  # bytes at most beside what was there; rows are 0.3e9 in each of two caches


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    raw = json.loads(preset_path("tiny").read_text()) | CHANGES
    checkpoint = write_tiny(folder / "checkpoint", raw=raw)
    numerics = Numerics(dtype=torch.float32, quant_sim=False)
    reader = Checkpoint(checkpoint)
    return load_model(reader, numerics, with_drafter=False, progress=lambda done, total: None)


def filled(config, pages):
    """A cache that holds everything before the last tokens, its rows seeded; pages as given."""
    cache = KVCache(
        config,
        n_slots=1,
        max_model_len=LENGTH,
        max_chunk=LAST,
        kv_record="fp32",
        index_record="fp32",
    )
    cache.place(0, 0, pages.tolist())
    g = torch.Generator().manual_seed(8)
    for layer in cache.layers:
        for storage in (layer.compressed, layer.index):
            if storage is not None:
                storage[pages] = torch.randn(storage.shape, generator=g)
        for storage in (layer.window, layer.state, layer.index_state):
            if storage is not None:
                storage.copy_(torch.randn(storage.shape, generator=g))
    return cache


def run(model, cache, ids, sizes, around=None):
    out, start = [], LENGTH - LAST
    assert sum(sizes) == LAST
    for size in sizes:
        first = start - (LENGTH - LAST)
        with use_policy(around=around):
            batch = cache.batch([Chunk(0, ids[first : first + size], start)])
            out.append(model.logits(model(batch, cache.layers)))
        start += size
    return torch.cat(out)


def exact_scores(call, token):
    """Scores of all rows that a token sees, in fp64, from rows in their order."""
    q, w = call["q"][token].double(), call["weights"][token].double()
    position = int(call["seq_lens"]) - len(call["q"]) + token
    rows = call["storage"][call["block_table"][0].long()].flatten(0, 1)
    seen = rows[: (position + 1) // call["compress_ratio"]].double()
    return (q @ seen.T).relu_().mul_(w.unsqueeze(1)).sum(0)


def exact_attention(call):
    """One softmax over window, chosen rows and sink, in fp64, a token at a time."""
    q, size = call["q"].double(), call["window_size"]
    ring = call["window"][call["window_block_table"][0].long()].flatten(0, 1)
    rows = None
    if call["compressed"] is not None:
        rows = call["compressed"][call["block_table"][0].long()].flatten(0, 1)
    out = torch.empty_like(q)
    for i in range(len(q)):
        position = int(call["seq_lens"]) - len(q) + i
        near = ring[position - size + 1 : position + 1]
        if rows is not None:
            seen = (position + 1) // call["compress_ratio"]
            far = rows[:seen] if call["indices"] is None else rows[call["indices"][i].long()]
            near = torch.cat((near, far))
        near = near.double()
        scores = q[i] @ near.T * call["softmax_scale"]
        top = scores.amax(-1, keepdim=True)
        p = (scores - top).exp()
        total = p.sum(-1, keepdim=True) + (call["sink"].double().unsqueeze(-1) - top).exp()
        out[i] = p @ near / total
    return out


@pytest.mark.slow
def test_the_last_tokens_of_a_million_see_the_rows_they_should(model):
    config, seen = model.config, set()
    n_pages = LENGTH // BLOCK_TOKENS
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (LAST,), generator=g).tolist()

    def check(op, kernel, *args, **kwargs):
        call, result = op.bind(*args, **kwargs), kernel(*args, **kwargs)
        if op.name == "index_select":
            for token in range(0, LAST, 23):
                scores = exact_scores(call, token)
                least = scores.topk(config.index_topk).values[-1]
                assert (scores[result[token].long()] >= least - 1e-4).all()
            assert int(result.max()) > n_pages * 31  # of the last pages too
        elif op.name == "sparse_attn":
            torch.testing.assert_close(result.double(), exact_attention(call), rtol=1e-4, atol=1e-4)
        else:
            return result
        seen.add((op.name, call["compress_ratio"]))
        return result

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        at_once = run(model, filled(config, torch.arange(n_pages)), ids, [LAST], check)
        assert seen == {
            ("index_select", 4), ("sparse_attn", 0), ("sparse_attn", 4), ("sparse_attn", 128),
        }  # fmt: skip
        scattered = filled(config, torch.randperm(n_pages, generator=g))
        in_steps = run(model, scattered, ids, [129, 160, *[1] * 11])
    torch.testing.assert_close(in_steps, at_once, rtol=1e-4, atol=1e-4)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
