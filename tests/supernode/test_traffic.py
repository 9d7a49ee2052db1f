"""What the plan expects on the wire; ranks count the same (tests/runtime/test_parallel.py)."""

import random
from collections import Counter

import pytest

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.supernode.traffic import Routing, Traffic, boundary_bytes

PRO = ModelConfig.read(preset_path("pro"))


@pytest.mark.parametrize("ep_size", [4, 16, 64])
def test_tokens_that_choose_evenly_reach_as_many_ranks_as_expected(ep_size):
    n, k, n_experts = 4_000, PRO.n_activated_experts, PRO.n_routed_experts
    draw, local = random.Random(ep_size), n_experts // ep_size
    tokens, rows = Counter(), Counter()
    for _ in range(n):
        chosen = [e // local for e in draw.sample(range(n_experts), k)]
        tokens.update(set(chosen))
        rows.update(chosen)
    even = Routing.even([n] * ep_size, n_experts, k)
    assert sum(even.tokens[0]) == pytest.approx(tokens.total(), rel=0.02)
    assert sum(even.rows[0]) == rows.total()


def traffic(**changes):
    p = ParallelConfig(dp_size=16, ep_size=16)
    plain = {"value_bytes": 2, "gathers": False, "parallel": p, "layers": [(0, PRO.n_layers)]}
    return Traffic(config=PRO, **plain | changes)


def test_sending_rows_where_they_belong_pays_beyond_a_few_ranks_and_fp8_more():
    tokens = [128] * 16
    gathered = traffic(gathers=True).forward(0, tokens)["ep"]
    sent = traffic().forward(0, tokens)["ep"]
    rounded = traffic(fp8=True).forward(0, tokens)["ep"]
    assert rounded < sent < gathered / 2
    reached = sum(Routing.even(tokens, PRO.n_routed_experts, PRO.n_activated_experts).tokens[0])
    saved = PRO.n_layers * reached * 15 / 16 * (PRO.dim - PRO.dim // 128)
    assert sent - rounded == pytest.approx(saved)


def test_a_boundary_carries_all_streams_and_the_last_stage_sends_none():
    two = ParallelConfig(pp_size=2)
    stages = traffic(parallel=two, layers=[(0, 31), (31, PRO.n_layers)])
    assert stages.forward(0, [5])["pp"] == boundary_bytes(PRO, 5, 2) == 5 * 4 * PRO.dim * 2
    assert not any(stages.forward(1, [5]).values())
    assert not any(stages.forward(0, [0]).values())
