import json
import re

import pytest
from layouts import LAYOUTS as LAYOUTS_OF_TINY
from layouts import make_plan
from typer.testing import CliRunner

from v4_ascend.backends.exchange import FEW_RANKS
from v4_ascend.checkpoint.costs import FORMATS
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.cli.app import app
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.errors import ConfigError, ShardError
from v4_ascend.runtime.bench_generate import OURS
from v4_ascend.runtime.bench_ranks import LAYOUTS


def _run(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_both_sides_are_timed_on_the_same_checkpoint(tmp_path):
    write_synthetic(
        in_format(ModelConfig.read(preset_path("tiny")), "fp32"), tmp_path / "c", seed=0
    )
    where = ("--checkpoint", tmp_path / "c", "--prompt", 16, "--rounds", 1)
    done = _run("decode", *where, "--tokens", 2, "--against", "transformers")
    assert done.exit_code == 0, done.exception
    for part in ("| decode, ", "| v4-ascend, cpu | ", "| transformers | ", "| ratio | "):
        assert part in done.stdout
    done = _run("decode", *where, "--tokens", 2, "--batch", 3, "--against", "transformers")
    assert done.exit_code == 0, done.exception
    assert "| ratio | " in done.stdout
    done = _run("prefill", *where, "--json")
    rates = json.loads(done.stdout)["data"]["tokens_per_s"]
    assert list(rates) == ["v4-ascend, cpu"]
    assert rates["v4-ascend, cpu"] > 0


def test_what_cannot_be_timed_is_refused(tmp_path):
    write_synthetic(ModelConfig.read(preset_path("tiny")), tmp_path / "c", seed=0)
    for args, says in (
        (("--against", "transformers"), "--format fp32 or bf16 only"),
        (("--backend", "tpu"), "no backend 'tpu'"),
        (("--prompt", 1 << 21), "is longer than 1048576 tokens"),
    ):
        done = _run("prefill", "--checkpoint", tmp_path / "c", *args)
        assert isinstance(done.exception, ConfigError)
        assert says in str(done.exception)


def test_the_engine_generates_what_transformers_does(tmp_path):
    write_synthetic(
        in_format(ModelConfig.read(preset_path("tiny")), "fp32"), tmp_path / "c", seed=0
    )
    where = ("--checkpoint", tmp_path / "c", "--prompts", 3, "--prompt", 20, "--tokens", 6)
    done = _run("generate", *where, "--rounds", 1, "--against", "transformers", "--json")
    assert done.exit_code == 0, done.exception
    sides = json.loads(done.stdout)["data"]["sides"]
    assert list(sides) == [OURS, "transformers, prompt by prompt", "transformers, one batch"]
    same = [side["same"] for side in sides.values()]
    assert same[:2] == [3, 3]
    assert same[2] < 3  # padded prompts are not the same prompts to it
    assert all(side["tokens_per_s"] > 0 for side in sides.values())
    for args, says in (
        (("--prompt", 1 << 20), "is longer than 1048576 tokens with its answer"),
        (("--shortest", 21), "is 21, longer than --prompt 20"),
    ):
        done = _run("generate", *where, *args)
        assert isinstance(done.exception, ConfigError)
        assert says in str(done.exception)


@pytest.mark.slow
def test_every_layout_of_ranks_is_timed(tmp_path):
    write_synthetic(
        in_format(ModelConfig.read(preset_path("tiny")), "fp32"), tmp_path / "c", seed=0
    )
    done = _run("ranks", "--checkpoint", tmp_path / "c", "--steps", 2, "--json")
    assert done.exit_code == 0, done.exception
    data = json.loads(done.stdout.splitlines()[-1])["data"]
    assert list(data["tokens_per_s"]) == list(LAYOUTS)
    assert all(rate > 0 for rate in data["tokens_per_s"].values())
    for row in data["layouts"]:
        # Where each token goes is the router's to say, and random weights choose unevenly.
        is_routed = row["n_ranks"] > FEW_RANKS
        assert row["sent"] == pytest.approx(row["planned"], rel=0.25 if is_routed else 1e-9)
    assert data["layouts"][0]["sent"] == 0
    for row in data["layouts"][-2:]:
        # Two busy cores wait for more than stages do; tests/runtime/test_idle_stages.py measures.
        assert len(row["idle"]) == len(row["simulated"]) == 2
        assert all(0 <= part < 1 for part in (*row["idle"], *row["simulated"]))


def test_loading_is_timed_against_the_files(tmp_path):
    config = ModelConfig.read(preset_path("tiny"))
    write_synthetic(config, tmp_path / "c", seed=0)
    done = _run("load", "--checkpoint", tmp_path / "c", "--rounds", 1)
    assert done.exit_code == 0, done.exception
    assert "| tensors | " in done.stdout
    assert "bytes, cold | GB/s | ratio to raw |" in done.stdout
    more = ("--rounds", 1, "--warm", "--every-way", "--json")
    found = json.loads(_run("load", "--checkpoint", tmp_path / "c", *more).stdout)["data"]
    assert len(found["bytes_per_s"]) == 7
    assert found["bytes"] == sum(h.nbytes for h in Checkpoint(tmp_path / "c").headers.values())
    assert all(rate > 0 for rate in found["bytes_per_s"].values())


def test_the_start_and_a_search_are_timed():
    done = _run("plan", "--topology", "supernode", "--rounds", 1, "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)["data"]
    assert found["devices"] == 64
    assert found["judged"] > 64
    assert 0 < found["seconds"]["python"] < found["seconds"]["v4-ascend --help"]
    assert found["seconds"]["search"] > 0
    assert isinstance(_run("plan").exception, ConfigError)


def test_every_command_is_timed_as_a_process_of_its_own_and_what_it_wrote_is_gone(tmp_path):
    """On a checkpoint that one command cannot take, what it said is told."""
    config = ModelConfig.read(preset_path("tiny"))
    write_synthetic(config, tmp_path / "c", seed=0)
    (tmp_path / "plan.json").write_text("{}")
    done = _run("checkpoint", "--checkpoint", tmp_path / "c", "--plan", tmp_path / "plan.json",
                "--scratch", tmp_path, "--rounds", 1)  # fmt: skip
    assert isinstance(done.exception, ShardError)
    assert re.search(r"bench shard .*: exit code 2: error: .*is not a plan", str(done.exception))


@pytest.mark.slow
def test_the_table_of_costs_has_every_command(tmp_path):
    write_synthetic(ModelConfig.read(preset_path("tiny")), tmp_path / "c", seed=0)
    make_plan(tmp_path / "c", LAYOUTS_OF_TINY["ep2"]).write(tmp_path / "plan.json")
    (tmp_path / "scratch").mkdir()
    done = _run("checkpoint", "--checkpoint", tmp_path / "c", "--plan", tmp_path / "plan.json",
                "--scratch", tmp_path / "scratch", "--rounds", 1, "--json")  # fmt: skip
    assert done.exit_code == 0, done.exception
    costs = json.loads(done.stdout)["data"]["costs"]
    assert [c["what"] for c in costs] == [
        "shard", "shard", *(f"convert --to {f}" for f in FORMATS),
        "reading for a load, cold", "reading for a load, warm",
    ]  # fmt: skip
    assert all(c["bytes_per_s"] > 0 and c["ratio"] > 0 for c in costs)
    # shard has no torch in memory, convert has.
    assert costs[0]["peak_bytes"] < costs[2]["peak_bytes"] < 2**30
    assert not list((tmp_path / "scratch").iterdir())
