"""shard as a user types it: from a topology to a deployment that reads its own files."""

import json

import pytest
from test_commands import run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("shard") / "tiny"
    done = run("init", "--preset", "tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def plan(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "plan"
    done = run("plan", "--topology", "laptop", "--set", f"model.checkpoint={tiny}", "--out", out)
    assert done.returncode == 0, done.stderr
    return out / "plan.json"


def test_a_dry_run_tells_sizes_and_writes_nothing(tiny, plan, tmp_path):
    done = run("shard", tiny, "--plan", plan, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert "6,002,604 bytes to write" in done.stdout
    assert not (tmp_path / "out").exists()


def test_deploy_reads_what_shard_made_and_refuses_another_layout(tiny, plan, tmp_path):
    out = tmp_path / "out"
    made = run("shard", tiny, "--plan", plan, "--out", out, "--json")
    assert made.returncode == 0, made.stderr
    data = json.loads(made.stdout)["data"]
    assert (data["ranks"], data["files"], data["bytes_written"]) == (1, 1, 6_002_604)
    assert "sharding: 100 %" in made.stderr
    again = run("shard", tiny, "--plan", plan, "--out", out)
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    resumed = run("shard", tiny, "--plan", plan, "--out", out, "--resume")
    assert "1 were there and whole" in resumed.stdout
    deploy = ("deploy", "--topology", "laptop", "--dry-run", "--set", f"model.checkpoint={out}")
    done = run(*deploy, "--port", 8123)
    assert done.returncode == 0, done.stderr
    two = "cluster.supernodes=[{name: a, hosts: [localhost], devices_per_host: 2}]"
    done = run(*deploy, "--set", two, "--set", "layout={pp_size: 2}")
    assert done.returncode == 1
    assert "was made for the layout" in done.stderr


def test_bench_shard_compares_with_cp(tiny, plan, tmp_path):
    done = run(
        "bench", "shard", "--checkpoint", tiny, "--plan", plan, "--scratch", tmp_path,
        "--rounds", 1, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["data"]["bytes_per_s"]) == {"shard", "cp", "cp and fsync"}
    assert not list(tmp_path.iterdir())
