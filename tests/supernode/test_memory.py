from functools import partial
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4_ascend.config.devices import device_profile
from v4_ascend.config.inventory import inventory
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import ParallelConfig, load_topology
from v4_ascend.runtime.kv_cache import KVCache
from v4_ascend.supernode.cache import (
    SPEC_RECORDS,
    RecordBytes,
    bytes_per_token,
    request_bytes,
    state_bytes,
    window_bytes,
)
from v4_ascend.supernode.collective_buffers import min_buffsize_mb
from v4_ascend.supernode.holdings import bytes_read, holdings
from v4_ascend.supernode.memory import MemoryModel, Serving
from v4_ascend.supernode.plan import Rank
from v4_ascend.supernode.planning import deploy_plan
from v4_ascend.supernode.versus_v32 import v4_token, v32_token
from v4_ascend.supernode.weights import Group, layer_weights, model_bytes

MODELS = {
    m: ModelConfig.read(preset_path(m))
    for m in ("flash", "flash-0731", "pro", "tiny", "tiny-dspark", "ascend-slice", "wide")
}
PRO, FLASH = MODELS["pro"], MODELS["flash"]
DT = device_profile("ascend-950dt-96", "here")
MI = 2**20


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_native_weights_are_the_inventory_to_the_byte(config):
    assert model_bytes(config, "native") == sum(t.nbytes for t in inventory(config))


@pytest.mark.parametrize(
    ("config", "fmt", "published"),
    [(PRO, "w4a8", 818e9), (FLASH, "w4a8", 151e9)],
    ids=["pro", "flash"],
)
def test_int4_weights_are_within_2_percent_of_the_published_checkpoints(config, fmt, published):
    assert model_bytes(config, fmt) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("config", "per_token", "window", "state"),
    [(FLASH, 3514.25, 3_289_088, 12_206_080), (PRO, 5031.4375, 4_634_624, 18_710_528)],
    ids=["flash", "pro"],
)
def test_caches_are_the_published_totals_to_the_byte(config, per_token, window, state):
    layers = range(config.n_layers)
    assert bytes_per_token(config, SPEC_RECORDS) == per_token
    assert window_bytes(config, SPEC_RECORDS, range(config.n_layers + 1), 128) == window
    assert state_bytes(config, layers) == state
    assert request_bytes(config, SPEC_RECORDS, layers, MI) == per_token * MI
    assert request_bytes(config, SPEC_RECORDS, layers, 1) == per_token * 128


def test_records_of_other_engines_are_the_published_totals():
    of = partial(RecordBytes.of, FLASH)
    assert bytes_per_token(FLASH, of("fp8_584", "fp8_132")) == 3850.25
    assert bytes_per_token(FLASH, of("bf16", "bf16")) == 6880
    assert bytes_per_token(PRO, RecordBytes.of(PRO, "bf16", "bf16")) == 9848


def test_narrow_models_keep_plain_rows():
    # Its indexer keys are as wide as V4's, its rows are not.
    assert RecordBytes.of(MODELS["tiny"], "fp8_640", "fp8_132") == RecordBytes(256, 132)


@pytest.mark.parametrize(
    ("config", "flops", "cache"), [(PRO, 0.27, 0.10), (FLASH, 0.10, 0.07)], ids=["pro", "flash"]
)
def test_the_reports_headline_against_v32_is_derived(config, flops, cache):
    ours, theirs = v4_token(config, MI), v32_token(MI)
    assert ours.fp8_flops / theirs.fp8_flops == pytest.approx(flops, abs=0.006)
    assert ours.bytes_per_token / theirs.bytes_per_token == pytest.approx(cache, abs=0.006)


def test_buffsize_of_a_worked_example():
    # Flash decode on A3, EP16, 16 local experts, 128 tokens a rank, 6 + 1 experts a token.
    need = 2 * (16 * 128 * 16 * 8704 + 7 * 128 * 8192)
    assert min_buffsize_mb(FLASH, "a3", 16, 16, 128) == -(-need // 2**20) == 558
    assert min_buffsize_mb(FLASH, "a3", 16, 16, 1) == 200


def serving(**given):
    values = {
        "weight_format": "native",
        "engine": "vllm",
        "max_model_len": MI,
        "max_chunk": 4096,
        "n_draft_tokens": 0,
        "utilisation": 0.92,
    }
    return Serving(**(values | given))


# vllm-ascend releases/v0.23.0: layouts that run on 950DT with 96 GB.
PUBLISHED = {
    "pro-dp2-tp8": (
        PRO,
        {"dp_size": 2, "tp_size": 8, "ep_size": 16, "dsa_cp": True},
        {"max_model_len": 200_000, "n_draft_tokens": 3, "utilisation": 0.94},
        40,
    ),
    "pro-decode": (PRO, {"dp_size": 32, "ep_size": 32}, {"n_draft_tokens": 3}, 32),
    "pro-prefill": (PRO, {"dp_size": 32, "ep_size": 32}, {"utilisation": 0.85}, 8),
    "flash": (FLASH, {"dp_size": 4, "ep_size": 4}, {"n_draft_tokens": 1}, 64),
}


@pytest.mark.parametrize(("config", "layout", "how", "n"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_layouts_fit(config, layout, how, n):
    model = MemoryModel(config, DT, serving(**how))
    memory = model.stage(ParallelConfig(**layout), (0, config.n_layers), n)
    assert memory.fits(model.serving.max_model_len)
    assert memory.n_requests(model.serving.max_model_len) >= 1


def test_pro_does_not_fit_on_eight_small_devices():
    small = device_profile("ascend-910b4-32", "here")
    model = MemoryModel(PRO, small, serving(weight_format="w4a8"))
    assert not model.stage(ParallelConfig(dp_size=8, ep_size=8), (0, 61), 1).fits(128)


def test_stages_share_all_weights():
    whole = MemoryModel(PRO, DT, serving())
    one = whole.stage(ParallelConfig(), (0, 61), 1)
    cut = [whole.stage(ParallelConfig(pp_size=2), r, 1) for r in ((0, 30), (30, 61))]
    for term in ("experts", "attention", "indexer", "shared", "embed", "head", "mixing"):
        assert sum(m.terms.get(term, 0) for m in cut) == one.terms[term]
    assert sum(m.per_block for m in cut) == one.per_block


def test_tp_splits_what_engines_split_and_nothing_else():
    w = layer_weights(PRO, 3, "native")
    model = MemoryModel(PRO, DT, serving())
    p = ParallelConfig(tp_size=8, ep_size=1, dsa_cp=True)
    terms = model.stage(p, (3, 4), 1).terms
    assert terms["attention"] == w.split["attention"] // 8 + w.replicated["attention"]
    assert terms["shared"] == w.replicated["shared"]


@given(
    context=st.integers(1, MI),
    more=st.integers(0, 4096),
    n=st.integers(1, 256),
    more_n=st.integers(0, 64),
)
@settings(max_examples=60, deadline=None)
def test_memory_grows_with_context_and_concurrency(context, more, n, more_n):
    model = MemoryModel(FLASH, DT, serving())
    p = ParallelConfig(dp_size=8, ep_size=8)
    a, b = (model.stage(p, (0, 43), k) for k in (n, n + more_n))
    assert b.fixed >= a.fixed
    assert a.fits(context) or not a.fits(context + more)
    assert a.fits(context) or not b.fits(context)


@pytest.mark.parametrize("name", ["flash", "flash-0731", "pro", "tiny"])
def test_planned_weights_of_stages_that_draft_are_what_ranks_read_to_the_byte(name):
    config = MODELS[name]
    model = MemoryModel(config, DT, serving(n_draft_tokens=1))
    cut, middle = ParallelConfig(pp_size=2), config.n_layers // 2
    plan = deploy_plan(load_topology("laptop", ["serve.n_draft_tokens=1"]), MODELS["tiny"])
    plan = plan.model_copy(update={"parallel": cut})
    for layers in ((0, middle), (middle, config.n_layers)):
        terms = model.stage(cut, layers, 1).terms
        rank = Rank(rank=0, host="a", layers=layers, experts=(0, config.n_routed_experts))
        planned = sum(terms.get(group, 0) for group in get_args(Group)) + terms["experts"]
        assert planned == bytes_read(holdings(config, plan, rank))


@pytest.mark.parametrize("layers", [(0, 6), (0, 3), (3, 6)])
@pytest.mark.parametrize(
    ("name", "n_drafts", "max_model_len"),
    [("tiny", 0, 512), ("tiny", 3, 512), ("tiny-dspark", 5, 512), ("tiny-dspark", 1, 1024)],
)
def test_planned_caches_are_those_a_rank_allocates(name, n_drafts, max_model_len, layers):
    """Windows and states of three requests, and their rows, the drafter's too: to the byte."""
    config = MODELS[name]
    how = {"max_model_len": max_model_len, "max_chunk": 512, "n_draft_tokens": n_drafts}
    model = MemoryModel(config, DT, serving(engine="native", n_snapshots=2, **how))
    model.records = RecordBytes.of(config, "plain", "plain", "fp32")
    memory = model.stage(ParallelConfig(), layers, 3)
    drafts = n_drafts > 0 and layers[1] == config.n_layers
    cache = KVCache(
        config,
        n_slots=3,
        max_model_len=max_model_len,
        max_chunk=512,
        kv_record="fp32",
        index_record="fp32",
        layers=(layers[0], layers[1] + (config.n_draft_layers if drafts else 0)),
        n_snapshots=2,
        n_drafts=n_drafts,
    )

    def nbytes(*parts):
        found = [getattr(layer, part) for layer in cache.layers for part in parts]
        return sum(x.nbytes for x in found if x is not None)

    assert memory.terms["request state"] == nbytes("window", "state", "index_state")
    assert memory.per_block * 3 * max_model_len // 128 == nbytes("compressed", "index")
    kept = cache._snapshots
    copies = sum(copy.nbytes for _, copy in (*kept.windows, *kept.states))
    assert memory.terms["prefix snapshots"] == copies
