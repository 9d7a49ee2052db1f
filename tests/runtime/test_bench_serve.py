"""Figures of a load, from times we made up."""

import json

import numpy as np
import pytest

from v4_ascend.errors import ConfigError
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
