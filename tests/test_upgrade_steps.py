"""docs/upgrades.md's walk, run from its text: what it shows is what is printed."""

import os
import re
import sys
from pathlib import Path

import pytest
from test_first_steps import pattern_of, printed, steps_of

TEXT = (Path(__file__).parent.parent / "docs/upgrades.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_walk_leads_where_its_text_says(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"XDG_STATE_HOME": str(tmp_path / "state"), "PATH": path, "OMP_NUM_THREADS": "1"}
    env = os.environ | own
    env.pop("TRITON_INTERPRET", None)  # other tests have it set
    try:
        for command, shown in steps_of(TEXT):
            told = printed(command, tmp_path, env)
            assert re.fullmatch(pattern_of(shown), told), f"$ {command}\n{told}"
    finally:
        printed("v4-ascend down laptop", tmp_path, env)


def test_there_are_steps():
    assert len(list(steps_of(TEXT))) > 8
