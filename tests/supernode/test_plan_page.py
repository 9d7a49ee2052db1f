import re

import golden_plans
import pytest

from v4_ascend.config.topology import load_topology
from v4_ascend.supernode.plan_page import page
from v4_ascend.supernode.planning import find_model, plan_pools
from v4_ascend.supernode.report import report


def made(*overrides):
    topology = load_topology("supernode", overrides)
    model = find_model(topology)
    return report(topology, model, plan_pools(topology, model), grow=False)


@pytest.fixture(scope="module")
def facts():
    return made("layout={pp_size: 2, dp_size: 24, ep_size: 24}")


def test_the_page_needs_nothing_else(facts):
    html = page(facts)
    assert not re.search(r"(src|href)\s*=", html)
    assert "<script" not in html
    assert html.count("<h1>") == 1


def test_it_says_what_the_plan_says(facts):
    html = page(facts)
    choice = facts["pools"][0]["chosen"]
    assert choice["n_idle"] == 16
    assert html.count('class="idle"') == 16
    assert html.count("<rect") == 64
    for stage in choice["stages"]:
        assert f"layers {stage['layers'][0]} to {stage['layers'][1] - 1}" in html
        for n in stage["memory"].values():
            assert f"{n / 1e9:,.2f}" in html
    for figure in choice["figures"]:
        assert figure["name"] in html
    assert facts["digest"] in html


def test_every_assumption_and_refusal_has_its_source():
    facts = made()
    html = page(facts)
    for row in (*facts["assumptions"], *facts["pools"][0]["rejected"]):
        assert row["source"].replace("'", "&#39;").replace("&#39;", "&#39;") in html


def test_names_are_escaped():
    facts = made()
    facts["name"] = "<script>alert(1)</script>"
    assert "<script>alert" not in page(facts)


def test_a_plan_without_a_layout_begins_with_why():
    html = page(made(*golden_plans.CASES["pro-8x910b4"]))
    assert html.index("no layout is legal") < html.index("Refused layouts")
    assert "The nearest miss" in html


def test_a_whole_pod_stays_small():
    html = page(made(*golden_plans.CASES["pro-8192x950dt"]))
    assert len(html) < 400_000
    assert 256 <= html.count("<rect") <= 1024


def test_two_pools_have_a_section_each():
    nodes = ", ".join(f"{{name: {n}, host_count: 4, devices_per_host: 8}}" for n in "pd")
    roles = "[{role: prefill, supernodes: [p]}, {role: decode, supernodes: [d]}]"
    html = page(made(f"cluster.supernodes=[{nodes}]", f"cluster.pools={roles}", "serve.slo={}"))
    assert "Prefill: It fits" in html
    assert "Decode: It fits" in html
