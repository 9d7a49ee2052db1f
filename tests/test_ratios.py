from dataclasses import replace

import pytest
import ratios

from v4_ascend.cli import bench

SIDES = {"sides": {"a": {"tokens_per_s": 6.0}, "b": {"tokens_per_s": 2.0}}}


def test_a_ratio_is_ours_over_the_other_of_one_run():
    assert ratios.of_sides(SIDES) == 3
    assert ratios.of_sides({"tokens_per_s": {"a": 6.0, "b": 2.0}}) == 3
    assert ratios.of_floor({"tokens_per_s": {"a": 3.0}, "floor": 4.0}) == 0.75
    assert ratios.of_bytes("x", "y")({"bytes_per_s": {"x": 1.0, "y": 4.0}}) == 0.25


def test_what_has_fallen_is_marked_and_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(ratios, "measure", lambda ratio, folder: ratio.least)
    monkeypatch.setattr("sys.argv", ["ratios.py"])
    assert ratios.main() is False
    assert "slower" not in capsys.readouterr().out
    monkeypatch.setattr(ratios, "measure", lambda ratio, folder: ratio.least - 0.1)
    monkeypatch.setattr("sys.argv", ["ratios.py", "decode"])
    assert ratios.main() is True
    least = ratios.RATIOS["decode"].least
    line = f"| decode | {least - 0.1:.2f} **slower** | of transformers | {least:g} |"
    assert line in capsys.readouterr().out


def test_every_ratio_asks_a_bench_that_is_there():
    known = {command.name for command in bench.bench.registered_commands}
    assert {ratio.bench[0] for ratio in ratios.RATIOS.values()} <= known


@pytest.mark.slow
def test_the_engine_is_far_ahead_of_prompts_one_by_one(tmp_path):
    ratio = ratios.RATIOS["generate"]
    small = ("--prompts", "8", "--prompt", "32", "--tokens", "12", "--rounds", "1")
    measured = ratios.measure(replace(ratio, bench=(*ratio.bench, *small)), tmp_path)
    assert measured >= 3  # eight prompts instead of sixteen, and beside other tests
