import json
from xml.etree import ElementTree

import pytest
import torch
from layouts import write_tiny
from typer.testing import CliRunner

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.cli.app import app
from v4_ascend.errors import ConfigError
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.resident import resident_bytes
from v4_ascend.runtime import bench_context
from v4_ascend.runtime.load import load_model
from v4_ascend.runtime.step_costs import step_costs
from v4_ascend.runtime.workload import Workload

FP32 = ("fp32", "fp32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("context") / "tiny")


@pytest.fixture(scope="module")
def model(tiny):
    numerics = Numerics(dtype=torch.float32, quant_sim=False)
    return load_model(
        Checkpoint(tiny), numerics, with_drafter=False, progress=lambda done, total: None
    )


def _run(tiny, *args):
    args = ["bench", "context", "--checkpoint", str(tiny), *map(str, args)]
    return CliRunner().invoke(app, args)


def test_caches_cost_what_a_token_reads(model):
    # Rows of 128 fp32: the window in six layers, 16 chosen rows and all index rows in three,
    # every row of a group of 128 in two.
    rows = 6 * 128 + 3 * (16 + 4096 // 4) + 2 * (4096 // 128)
    assert step_costs(model, FP32, Workload(1, 1, 4096)).cache_bytes == rows * 128 * 4
    assert step_costs(model, FP32, Workload(3, 1, 4096)).cache_bytes == 3 * rows * 128 * 4


def test_a_batch_reads_weights_once_and_the_experts_it_may_choose(model):
    c = model.config
    expert = 3 * c.dim * c.moe_inter_dim * 4 * c.n_layers
    one = step_costs(model, FP32, Workload(1, 1, 4096))
    many = step_costs(model, FP32, Workload(1000, 1, 4096))
    read = many.weight_bytes - one.weight_bytes
    assert read == pytest.approx((c.n_routed_experts - c.n_activated_experts) * expert)
    assert many.operations == pytest.approx(1000 * one.operations)


def test_a_prompt_costs_what_its_tokens_would_one_by_one_but_weights_and_the_head_once(model):
    n, head = 512, resident_bytes(model.head) / 4
    whole = step_costs(model, FP32, Workload(1, n, 0))
    each = [step_costs(model, FP32, Workload(1, 1, i)) for i in range(n)]
    alone = sum(c.operations for c in each)
    assert whole.operations == pytest.approx(alone - (n - 1) * 2 * head, rel=2e-3)
    rows = 6 * n + 3 * 2 * n / 4 + 2 * n / 128
    assert whole.cache_bytes == rows * 128 * 4
    assert whole.weight_bytes == pytest.approx(resident_bytes(model) - model.embed.nbytes)


def test_every_point_has_a_time_and_a_floor_and_is_drawn(tiny, tmp_path):
    picture = tmp_path / "context.svg"
    points = ("--context", 64, "--context", 600, "--batch", 1, "--batch", 2)
    done = _run(tiny, *points, "--steps", 1, "--plot", picture, "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout.splitlines()[-1])["data"]["points"]
    assert [(p["batch"], p["context"]) for p in found] == [(1, 64), (1, 600), (2, 64), (2, 600)]
    assert all(p["seconds"] > p["floor"] > 0 for p in found)
    lines = ElementTree.parse(picture).getroot().findall("{*}polyline")
    assert len(lines) == 4
    places = [tuple(map(float, xy.split(","))) for xy in lines[0].get("points").split()]
    assert places[0][0] < places[1][0]


def test_caches_beyond_the_memory_are_left_out_and_said(tiny, model, monkeypatch):
    assert bench_context._why_not(model.config, FP32, 1, 1 << 20) is None
    said = bench_context._why_not(model.config, FP32, 10**6, 1 << 20)
    assert said.endswith("GB are more than half of the memory")
    monkeypatch.setattr(bench_context, "_why_not", lambda *_: "caches of 9 GB are too many")
    done = _run(tiny, "--context", 64, "--steps", 1)
    assert done.exit_code == 0, done.exception
    assert "not run: caches of 9 GB are too many" in done.stdout


@pytest.mark.parametrize(
    ("context", "says"), [(1 << 21, "is more than the model's"), (2, "is less than 11 steps take")]
)
def test_contexts_that_cannot_be_are_refused(tiny, context, says):
    done = _run(tiny, "--context", context)
    assert isinstance(done.exception, ConfigError)
    assert says in str(done.exception)
