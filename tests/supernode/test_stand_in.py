"""A real plan's layout on a few processes: the same kinds of groups, each smaller."""

import pytest
from golden_plans import CASES, plan

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.stand_in import ledger, shrunk

TINY = ModelConfig.read(preset_path("tiny"))


@pytest.mark.parametrize(
    ("real", "n_ranks", "want"),
    [
        ({"dp_size": 64, "ep_size": 64}, 16, {"dp_size": 16, "ep_size": 8}),
        ({"pp_size": 2, "dp_size": 32}, 4, {"pp_size": 2, "dp_size": 2}),
        (
            {"dp_size": 2, "tp_size": 8, "ep_size": 16, "dsa_cp": True},
            4,
            {"dp_size": 2, "tp_size": 2, "ep_size": 4, "dsa_cp": True},
        ),
        ({"dp_size": 64, "ep_size": 64}, 1, {}),
        ({"pp_size": 16, "dp_size": 4}, 16, {"pp_size": 4, "dp_size": 4}),
    ],
)  # fmt: skip
def test_groups_shrink_in_order(real, n_ranks, want):
    assert shrunk(ParallelConfig(**real), n_ranks, TINY) == ParallelConfig(**want)


def test_more_ranks_than_it_can_stand_for_are_refused():
    with pytest.raises(ConfigError, match="8 ranks are more than the plan's 4"):
        shrunk(ParallelConfig(dp_size=4), 8, TINY)


def test_the_ledger_has_a_line_for_each_rank():
    (pool,) = plan(*CASES["pro-64x950dt"])
    layout = shrunk(pool.chosen.parallel, 16, TINY)
    lines = ledger(pool, 16, layout)
    assert len(lines) == 16
    assert lines[-1].startswith("rank 15 stands for rank 60 on sp0-host7: stage 0, ")
    assert "experts 360 to 365" in lines[-1]
