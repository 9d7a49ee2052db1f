"""Figures of a load, from times we made up."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from v4_ascend.cli.app import app
from v4_ascend.errors import ConfigError
from v4_ascend.runtime.bench_prediction import Report, compared
from v4_ascend.runtime.bench_serve import Load, Measured, prompts_of_file, random_prompts
from v4_ascend.runtime.bench_serve_report import result_of

ALL = Load(rate=None, concurrency=None, seed=0)


def request(sent, pieces, n_output, error=None):
    return Measured(sent, pieces, pieces[-1] if pieces else sent, 10, n_output, error)


def test_times_are_what_their_names_say():
    rows = [
        request(1.0, [1.5, 1.6, 1.8], 3),
        request(2.0, [2.1], 1),
        request(3.0, [], 0, error="status 500"),
    ]
    r = result_of(rows, 4.0, model="m", load=ALL, goodput={"ttft": 200.0, "tpot": 100.0})
    assert (r["completed"], r["failed"], r["num_prompts"]) == (2, 1, 3)
    assert r["mean_ttft_ms"] == pytest.approx((500 + 100) / 2)
    assert r["mean_tpot_ms"] == pytest.approx(150)  # of requests with more than one token
    assert r["mean_itl_ms"] == pytest.approx((100 + 200) / 2)
    assert r["p90_e2el_ms"] == pytest.approx(np.percentile([800, 100], 90))
    assert r["output_throughput"] == pytest.approx(4 / 4.0)
    assert r["total_token_throughput"] == pytest.approx((4 + 20) / 4.0)
    assert r["request_goodput"] == pytest.approx(1 / 4.0)
    assert r["errors"] == ["", "", "status 500"]


def report(tmp_path, *options):
    folder = tmp_path / "plan"
    done = CliRunner().invoke(app, ["plan", "--topology", "laptop", *options, "--out", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


def test_a_plans_figures_stand_beside_what_was_measured(tmp_path):
    folder = report(tmp_path)
    chosen = json.loads((folder / "report.json").read_text())["pools"][0]["chosen"]
    tpot, ttft, throughput = chosen["figures"]
    predicted = Report.read(folder)
    n = chosen["batch_per_dp"] * chosen["parallel"]["dp_size"]
    serve = predicted.serve
    result = {
        "mean_tpot_ms": tpot["value"],
        "mean_ttft_ms": 2 * ttft["high"],
        "output_throughput": throughput["low"],
        "input_lens": [serve.input_tokens] * n,
        "output_lens": [serve.output_tokens] * n,
        "max_concurrency": None,
        "num_prompts": n,
        "request_rate": "inf",
    }
    got = compared(predicted, result)
    assert [f["is_inside"] for f in got["figures"]] == [True, False, True]
    assert [f["ratio"] for f in got["figures"]][0] == 1
    assert got["figures"][1]["ratio"] == pytest.approx(2 * ttft["high"] / ttft["value"])
    assert got["output_throughput_per_device"] == throughput["low"] / chosen["n_used"]
    assert got["load_differs"] == []
    other = result | {"max_concurrency": 7 * n, "input_lens": [3], "output_lens": [9]}
    assert compared(predicted, other)["load_differs"] == [
        f"prompts of 3 tokens, {serve.input_tokens:,} were planned",
        f"answers of 9 tokens, {serve.output_tokens:,} were planned",
        f"{7 * n:,} requests at a time, {n:,} were planned",
    ]


def test_roles_apart_are_compared_by_what_each_does(tmp_path):
    folder = tmp_path / "plan"
    command = ["plan", "--topology", "pro-prefill-decode", "--out", str(folder)]
    assert CliRunner().invoke(app, command).exit_code == 0
    result = dict.fromkeys(("mean_tpot_ms", "mean_ttft_ms", "output_throughput"), 1.0)
    result |= {"input_lens": [1], "output_lens": [1], "max_concurrency": 1, "num_prompts": 1}
    got = compared(Report.read(folder), result | {"request_rate": 2.0})
    names = ["time to first token", "time per output token", "throughput"]
    assert [f["name"] for f in got["figures"]] == names
    assert len(got["layout"]) == 2
    assert "requests came at a rate, a full batch was planned" in got["load_differs"]


@pytest.mark.parametrize(
    ("text", "says"), [("{", "truncated"), ('{"name": 3}', "str"), (None, "cannot be read")]
)
def test_what_is_no_report_is_refused(tmp_path, text, says):
    file = tmp_path / "report.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        Report.read(tmp_path if text is None else file)


def test_prompts_have_their_length_and_differ():
    prompts = random_prompts(50, 8, 4, seed=1)
    assert {len(p.prompt) for p in prompts} == {8}
    assert len({tuple(p.prompt) for p in prompts}) == 50
    assert random_prompts(50, 8, 4, seed=1) == prompts


def test_a_file_is_used_over_again_and_its_wrong_line_is_named(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "a", "output_len": 3}) + '\n\n{"prompt": "b"}\n')
    got = prompts_of_file(file, 3, 9)
    assert [(p.prompt, p.output_len) for p in got] == [("a", 3), ("b", 9), ("a", 3)]
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match="p.jsonl:2: must be an object with a prompt"):
        prompts_of_file(file, 1, 1)
