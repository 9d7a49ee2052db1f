import json

import golden_plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.plan_simulation import decode_pipeline
from v4_ascend.supernode.planning import plan_for, ranks_of
from v4_ascend.supernode.rules import CHECKS, Candidate, all_rules, notes
from v4_ascend.supernode.stages import balance

GOLDEN = json.loads(golden_plans.FILE.read_text())
PUBLISHED = "engine=vllm"
TP8 = "layout={dp_size: 2, tp_size: 8, ep_size: 16, dsa_cp: true}"


def plan(*overrides):
    return golden_plans.plan(*overrides)


@pytest.mark.parametrize("name", golden_plans.CASES)
def test_golden_plans(name):
    assert golden_plans.facts(name) == GOLDEN[name]


def test_the_published_layout_of_16_devices_is_legal_and_ranked():
    base = [
        *golden_plans.CASES["pro-16x950dt"],
        PUBLISHED,
        "serve.max_model_len=200000",
        "serve.concurrency=80",
        "serve.n_draft_tokens=3",
        "serve.memory_utilisation=0.94",
        "runtime.max_chunk=4096",
        "serve.slo={}",
    ]
    (alone,) = plan(*base, TP8)
    assert alone.chosen is not None
    assert alone.chosen.batch >= 40
    (ranked,) = plan(*base)
    wanted = alone.chosen.parallel
    assert wanted in [c.parallel for c in ranked.found.choices]


def test_the_published_layout_without_dsa_cp_is_refused():
    (pool,) = plan(
        *golden_plans.CASES["pro-16x950dt"],
        PUBLISHED,
        "layout={dp_size: 2, tp_size: 8, ep_size: 16}",
    )
    assert pool.chosen is None
    assert [r.rule.id for r in pool.found.rejected] == ["R1"]


def pools(*extra):
    nodes = ", ".join(f"{{name: {n}, host_count: 4, devices_per_host: 8}}" for n in "pd")
    roles = (
        "[{role: prefill, supernodes: [p], concurrency: 256, max_chunk: 4096, "
        "memory_utilisation: 0.85, layout: {dp_size: 32, ep_size: 32}}, "
        "{role: decode, supernodes: [d], concurrency: 1024, memory_utilisation: 0.92, "
        "layout: {dp_size: 32, ep_size: 32}}]"
    )
    return plan(
        PUBLISHED,
        f"cluster.supernodes=[{nodes}]",
        f"cluster.pools={roles}",
        "serve.max_model_len=1048576",
        "serve.n_draft_tokens=3",
        "serve.slo={}",
        *extra,
    )


def test_the_published_split_of_64_devices_is_legal():
    prefill, decode = pools()
    assert (prefill.system.role, decode.system.role) == ("prefill", "decode")
    assert prefill.chosen is not None
    assert decode.chosen is not None
    assert decode.chosen.batch >= 32


def test_pools_with_other_blocks_are_refused():
    roles = (
        "[{role: prefill, supernodes: [p], block_size: 64}, "
        "{role: decode, supernodes: [d], block_size: 128}]"
    )
    with pytest.raises(ConfigError, match=r"E-POOLS-DIFFER.*64 for prefill and 128"):
        pools(f"cluster.pools={roles}")


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ({"dp_size": 16, "tp_size": 4, "ep_size": 64}, "R1"),
        ({"dp_size": 64, "ep_size": 64, "n_redundant_experts": 1}, "R4"),
        ({"dp_size": 64, "ep_size": 64, "dsa_cp": True}, "D11"),
        ({"dp_size": 4, "tp_size": 16, "ep_size": 64}, "R1"),
        ({"dp_size": 64, "ep_size": 2}, "M1"),
    ],
)
def test_a_given_layout_that_is_illegal_is_refused_by_its_rule(layout, rule):
    text = ", ".join(f"{k}: {str(v).lower()}" for k, v in layout.items())
    (pool,) = plan(f"layout={{{text}}}")
    assert pool.chosen is None
    assert [r.rule.id for r in pool.found.rejected] == [rule]


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ({"dp_size": 32, "cp_size": 2, "ep_size": 64}, "D7"),
        ({"dp_size": 32, "tp_size": 2, "ep_size": 64, "dsa_cp": True}, "D8"),
    ],
)
def test_what_the_search_leaves_out_can_be_asked_for_and_is_told(layout, rule):
    assert rule in GOLDEN["pro-64x950dt"]["refused"]
    text = ", ".join(f"{k}: {str(v).lower()}" for k, v in layout.items())
    (asked,) = plan(f"layout={{{text}}}")
    assert asked.chosen.parallel == ParallelConfig(**layout)
    s = asked.search
    candidate = Candidate(s.config, s.system, s.serving, asked.chosen.parallel)
    assert rule in {n.rule.id for n in notes(candidate, s.rules)}


def test_rules_of_another_engine_do_not_apply():
    (native,), (vllm,) = plan(), plan(PUBLISHED)
    of = {r.rule.id for r in vllm.found.rejected}
    assert "R9" in of
    assert "R9" not in {r.rule.id for r in native.found.rejected}
    assert any(c.parallel.pp_size > 1 for c in native.found.choices)
    assert all(c.parallel.pp_size == 1 for c in vllm.found.choices)


def test_every_check_is_named_and_every_rule_has_a_source():
    rules = all_rules()
    assert {r.check for r in rules if r.check} == set(CHECKS)
    assert len({r.id for r in rules}) == len({r.code for r in rules}) == len(rules)
    assert all(r.check for r in rules if r.kind in ("reject", "avoid"))
    assert {f"R{i}" for i in range(1, 27)} <= {r.id for r in rules}


@pytest.mark.parametrize("objective", ["throughput", "latency", "context", "devices"])
def test_the_best_is_best_by_its_objective(objective):
    (pool,) = plan(f"serve.objective={objective}")
    key = {
        "throughput": lambda c: -c.predicted.tokens_per_s,
        "latency": lambda c: c.predicted.tpot_ms,
        "context": lambda c: -min(c.max_context, 2**20),
        "devices": lambda c: c.parallel.world_size,
    }[objective]
    legal = [c for c in pool.found.choices if c.meets_slo]
    assert key(pool.chosen) == min(map(key, legal))


@pytest.mark.parametrize("objective", ["throughput", "latency", "context"])
@given(n=st.integers(2, 12), more=st.integers(0, 4))
@settings(max_examples=8, deadline=None)
def test_more_hosts_never_make_the_best_worse(objective, n, more):
    def best(n_hosts):
        hosts = f"cluster.supernodes=[{{name: a, host_count: {n_hosts}, devices_per_host: 8}}]"
        (pool,) = plan(hosts, f"serve.objective={objective}", "serve.slo={}")
        c = pool.chosen
        return {
            "throughput": c.predicted.tokens_per_s,
            "latency": -c.predicted.tpot_ms,
            "context": min(c.max_context, 2**20),
        }[objective]

    assert best(n + more) >= best(n) - 1e-9 * abs(best(n))


@given(
    costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=70),
    pp=st.integers(1, 70),
    last=st.floats(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_stages_cover_layers_once_and_are_balanced(costs, pp, last):
    pp = min(pp, len(costs))
    stages = balance(costs, pp, 0.0, last)
    assert [i for a, b in stages for i in range(a, b)] == list(range(len(costs)))
    assert all(a < b for a, b in stages)
    worst = max(sum(costs[a:b]) + (last if b == len(costs) else 0) for a, b in stages)
    assert worst <= (sum(costs) + last) / pp + max(costs) + last + 1e-3 * sum(costs)


def test_the_last_stage_is_timed_with_its_drafter_and_boundaries_with_what_it_is_fed():
    asked = ["model.name=v4-flash-0731", *golden_plans.cluster("ascend-a3-64", 2, 16)]
    asked += ["layout={pp_size: 2, dp_size: 16, ep_size: 16}", "runtime.fallback=reference"]
    tails, boundaries = [], []
    for n_drafts in (0, 5):
        (pool,) = plan(*asked, f"serve.n_draft_tokens={n_drafts}")
        tails.append(decode_pipeline(pool, pool.chosen).tail_s)
        model = pool.search.time_model(pool.chosen.parallel)
        # Target layers are 40, 41 and 42.
        ends = [model.boundary_s(10**6, ((0, n), (n, 43))) for n in (40, 41, 42)]
        boundaries.append([s - model.boundary_s(0, ((0, 40), (40, 43))) for s in ends])
    assert tails[1] > 1.5 * tails[0]
    plain, with_drafts = boundaries
    assert plain == [plain[0]] * 3
    assert with_drafts == pytest.approx([plain[0] * (4 + n) / 4 for n in range(3)])


def test_every_expert_is_on_a_rank_of_each_group_and_every_layer_on_one_stage():
    (pool,) = plan("layout={pp_size: 2, dp_size: 32, ep_size: 32}")
    config = ModelConfig.read(preset_path("pro"))
    ranks = ranks_of(pool.system, config, pool.chosen)
    for group in range(2):
        mine = ranks[group * 32 : group * 32 + 32]
        held = [e for r in mine for e in range(*r.experts)]
        assert held == list(range(384))
        assert len({r.layers for r in mine}) == 1
    assert ranks[0].layers[0] == 0
    assert ranks[0].layers[1] == ranks[32].layers[0]
    assert ranks[32].layers[1] == 61
    assert [r.host for r in ranks[:9]] == ["sp0-host0"] * 8 + ["sp0-host1"]


def test_a_plan_never_exceeds_the_device():
    for name in golden_plans.CASES:
        if name != "pro-8x910b4":
            (pool,) = plan(*golden_plans.CASES[name])
            for c in pool.found.choices:
                n = pool.search.serving.max_model_len
                for m in c.memory:
                    assert m.fixed + -(-n // 128) * m.per_block <= m.available
                    assert m.available <= pool.system.profile.memory_bytes.value


def test_a_plan_survives_its_file(tmp_path):
    from v4_ascend.config.topology import load_topology
    from v4_ascend.supernode.plan import Plan

    topology = load_topology("supernode")
    (pool,) = plan()
    made = plan_for(topology, pool)
    made.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert (again, again.digest) == (made, made.digest)
