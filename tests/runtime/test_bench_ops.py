"""`bench ops`: its workloads, what they cost at least, and what it prints."""

import json

import pytest
import torch
from typer.testing import CliRunner

from v4_ascend.backends import BACKENDS
from v4_ascend.cli.app import app
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.ops import OPS, use_policy
from v4_ascend.runtime.bench_ops import Rates
from v4_ascend.runtime.op_workloads import Call, calls
from v4_ascend.runtime.workload import Maker, Workload

CONFIG = ModelConfig.read(preset_path("wide"))
INDEXER = "index_topk hadamard fp4_round_trip"
WHOLE = (
    "hc_pre hc_post rms_norm act_quant head_rms_norm rope topk_gate swiglu fp8_gemm heads_gemm "
    f"linear fp8_round_trip {INDEXER}"
)


def _bytes(value):
    values = value if isinstance(value, tuple) else value.values()
    return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))


def _calls(work):
    return list(calls(CONFIG, Workload.parse(work), Maker("cpu"), "bf16", "bf16"))


@pytest.mark.parametrize("work", ["decode:3:2200", "prefill:40:0"])
def test_bytes_are_those_of_inputs_and_outputs(work):
    """Of operators that read all they are given; scales and lengths are the few per cent."""
    seen = set()
    with torch.inference_mode():
        for call in _calls(work):
            if call.op in WHOLE.split():
                inputs = call.make()
                result = OPS[call.op].reference(**inputs)
                moved = _bytes(inputs) + _bytes(result if isinstance(result, tuple) else (result,))
                assert call.nbytes == pytest.approx(moved, rel=0.03), call.op
                seen.add(call.op)
    assert seen == set(WHOLE.split()) - set(INDEXER.split() if work.startswith("prefill") else ())


@pytest.mark.parametrize("work", ["decode:2:2200", "prefill:140:2200"])
def test_every_call_can_be_made(work):
    with torch.inference_mode(), use_policy(backend="cpu"):
        for call in _calls(work):
            inputs = call.make()
            out = OPS[call.op](**inputs)
            outputs = out if isinstance(out, tuple) else (out,)
            assert all(o.float().isfinite().all() for o in outputs)
            assert call.operations >= 0
            assert call.nbytes > 0


@pytest.mark.parametrize(
    ("work", "ratio", "topk", "rows"),
    [
        ("decode:1:8192", 4, None, 2048),
        ("decode:1:8192", 4, 512, 512),
        ("prefill:8:0", 4, None, 1),
        ("prefill:4096:0", 4, 512, 512 * (0.5 * 0.5 + 0.5)),  # half of it still climbs
        ("prefill:128:4096", 128, None, 32.5),
    ],
)
def test_rows_that_a_token_sees(work, ratio, topk, rows):
    assert Workload.parse(work).seen(ratio, topk) == pytest.approx(rows)


def test_the_floor_is_the_larger_of_bytes_and_products():
    rates = Rates(copy=100.0, products={"fp32": 1.0, "bf16": 10.0, "fp8": 20.0})
    assert rates.floor(Call("x", "", dict, 200, 10, "bf16")) == 2.0
    assert rates.floor(Call("x", "", dict, 200, 100, "fp8")) == 5.0


def test_it_prints_a_row_for_every_call_and_json():
    work = ("--model", "tiny", "--work", "decode:1:200", "--op", "rms_norm")
    shown = CliRunner().invoke(app, ["bench", "ops", *work])
    assert shown.exit_code == 0, shown.output
    assert "| rms_norm | rms_norm" in shown.stdout
    data = json.loads(CliRunner().invoke(app, ["bench", "ops", *work, "--json"]).stdout)["data"]
    (row,) = data["work"]["decode:1:200"]
    assert row["seconds"] > 0
    assert row["floor"] == pytest.approx(row["nbytes"] / data["rates"]["copy"])
    assert set(data["machine"]) == {"device", "torch", "python"}


def test_a_layer_is_timed_beside_the_sum_of_its_operators():
    asked = ("--model", "tiny", "--experts", "4", "--work", "decode:2:200", "--json")
    shown = CliRunner().invoke(app, ["bench", "layer", *asked])
    assert shown.exit_code == 0, shown.output
    csa, hca = json.loads(shown.stdout)["data"]["work"]["decode:2:200"]
    assert (csa["kind"], hca["kind"]) == ("CSA", "HCA")
    assert csa["n_calls"] > hca["n_calls"] > 20
    assert 0 < csa["floor"] < csa["seconds"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--experts", "1"), "1, must be 2 to 8"),
        (("--experts", "9"), "9, must be 2 to 8"),
        (("--experts", "4", "--work", "prefill:8:0"), "a layer is timed decoding"),
    ],
)
def test_a_layer_that_cannot_be_timed_is_refused(args, says):
    result = CliRunner().invoke(app, ["bench", "layer", "--model", "tiny", *args])
    assert says in str(result.exception)
    assert result.exception.exit_code == 2


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--model", "huge"), "neither a preset"),
        (("--work", "decode:1"), "neither decode:BATCH:CONTEXT nor"),
        (("--work", "sleep:1:2"), "neither decode:BATCH:CONTEXT nor"),
        (("--op", "hc_prep"), "no operator 'hc_prep'"),
        (("--backend", "tpu"), "no backend 'tpu'"),
    ],
)
def test_wrong_input_is_refused(args, says):
    result = CliRunner().invoke(app, ["bench", "ops", "--model", "tiny", *args])
    assert says in str(result.exception)
    assert result.exception.exit_code == 2


def test_a_planned_gpu_is_not_another(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (10, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "B200")
    BACKENDS["cuda"].use_chip("sm_100")
    with pytest.raises(Exception, match=r"'sm_90', but the GPU here is sm_100 \(B200\)"):
        BACKENDS["cuda"].use_chip("sm_90")
