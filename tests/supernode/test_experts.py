"""Experts placed by load: everything is somewhere, nothing twice on a rank, and it helps."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import load_topology
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.diff import plan_diff
from v4_ascend.supernode.experts import ExpertLoad, by_number, place_layer, rank_imbalance
from v4_ascend.supernode.plan import experts_of
from v4_ascend.supernode.planning import find_model, plan_for, plan_pools

tokens = st.lists(st.integers(0, 1000), min_size=12, max_size=12)


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 2), tokens)
@settings(max_examples=300, deadline=None)
def test_every_expert_has_a_rank_and_no_rank_has_it_twice(ep, n_each, counts):
    more = ep * n_each
    if more > 12 * (ep - 1):
        with pytest.raises(ValueError, match="copies of 12 experts"):
            place_layer(counts, ep, more)
        return
    placed = place_layer(counts, ep, more)
    assert {len(experts) for experts in placed} == {(12 + more) // ep}
    assert all(len(set(experts)) == len(experts) for experts in placed)
    assert {e for experts in placed for e in experts} == set(range(12))


@given(st.lists(st.integers(1, 50), min_size=6, max_size=6))
def test_packing_is_near_the_best_there_is(counts):
    best = min(
        max(sum(counts[e] for e in half), sum(counts) - sum(counts[e] for e in half))
        for half in itertools.combinations(range(6), 3)
    )
    placed = place_layer(counts, 2, 0)
    ours = max(sum(counts[e] for e in experts) for experts in placed)
    assert ours <= 4 / 3 * best  # Graham's bound for the longest first


def test_copies_go_where_the_tokens_are():
    counts = [800, 100, 100, 100, 100, 100, 100, 100]
    assert rank_imbalance(counts, by_number(8, 4)) == pytest.approx(2.4)
    assert rank_imbalance(counts, place_layer(counts, 4, 0)) == pytest.approx(2.4)
    with_copies = place_layer(counts, 4, 4)
    assert sum(0 in experts for experts in with_copies) == 4
    assert rank_imbalance(counts, with_copies) < 1.2


def trace(tmp_path, config, seed=0):
    rng = random.Random(seed)
    rows = [
        [int(1000 * rng.paretovariate(1.5)) for _ in range(config.n_routed_experts)]
        for _ in range(config.n_layers)
    ]
    file = tmp_path / "load.json"
    file.write_text(json.dumps({"version": 1, "counts": rows}))
    return file


def test_a_trace_gives_a_plan_with_copies_and_the_diff_names_who_reloads(tmp_path):
    topology = load_topology("supernode")
    model = find_model(topology)
    load = ExpertLoad.read(trace(tmp_path, model.config), model.config)
    (blind,) = plan_pools(topology, model)
    (pool,) = plan_pools(topology, model, load)
    p = pool.chosen.parallel
    assert p.n_redundant_experts > 0
    plan = plan_for(topology, pool)
    assert len(plan.expert_placement) == model.config.n_layers
    held = [experts_of(plan, r) for r in plan.ranks]
    n_local = (384 + p.n_redundant_experts) // p.ep_size
    assert all(len(layer) == n_local for rank in held for layer in rank)
    for layer in range(model.config.n_layers):
        assert {e for rank in held[: p.ep_size] for e in rank[layer]} == set(range(384))
    assert pool.search.imbalance(p) < load.imbalance(p.ep_size, 0)
    changed = plan_diff(plan_for(topology, blind), plan)
    assert changed["ranks_moved"] == len(plan.ranks)


TINY = ModelConfig.read(preset_path("tiny"))
N_LAYERS, N = TINY.n_layers, TINY.n_routed_experts


def counts(row, n_layers=N_LAYERS):
    return json.dumps({"version": 1, "counts": [row] * n_layers})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("[]", "is no trace"),
        ('{"version": 2, "counts": []}', "is no trace"),
        ('{"version": 1, "counts": 3}', f"must have {N_LAYERS} layers, has int"),
        (counts([1] * N, 1), f"must have {N_LAYERS} layers, has 1"),
        (counts([1]), f"counts[0]: must have {N} experts, has 1"),
        (counts([0] * N), "counts[0]: no expert got a token"),
        (counts([-1] * N), "counts[0]: -1 is no count"),
        (counts([True] * N), "counts[0]: True is no count"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text, says):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ConfigError, match="t.json") as e:
        ExpertLoad.read(tmp_path / "t.json", TINY)
    assert says in str(e.value)
