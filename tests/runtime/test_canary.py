"""Ready only as the reference says: a record of `parity record`, and models that are not it."""

import json

import pytest
import torch
from layouts import make_plan, write_tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.cli.app import app
from v4_ascend.config.topology import load_topology, require_supported
from v4_ascend.errors import ConfigError, ParityError
from v4_ascend.model.attention import Attention
from v4_ascend.ops import use_policy
from v4_ascend.runtime.canary import canary
from v4_ascend.runtime.engine import Engine
from v4_ascend.supernode.planning import deploy_plan

N = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canary")
    checkpoint = write_tiny(folder / "checkpoint")
    g = torch.Generator().manual_seed(2)
    vocab = Checkpoint(checkpoint).config.vocab_size
    save_file({"input_ids": torch.randint(0, vocab, (2, N), generator=g)}, folder / "ids")
    command = [
        "parity",
        "record",
        "--checkpoint",
        str(checkpoint),
        "--input-ids",
        str(folder / "ids"),
    ]
    command += ["--prefill", "100", "--chunk", "64", "--dtype", "fp32", "--quant-sim", "off"]
    done = CliRunner().invoke(app, [*command, "--trace", "--out", str(folder / "reference")])
    assert done.exit_code == 0, done.output
    return folder


def engine_of(folder, reference, **changes):
    changes["reference"] = reference and str(reference)
    plan = make_plan(folder / "checkpoint", {}, kernels="fast", **changes)
    with use_policy(kernels="fast"):
        return Engine.load(plan, lambda done, total: None), plan


def test_the_model_of_the_reference_is_ready(folder):
    engine, plan = engine_of(folder, folder / "reference")
    report = canary(engine, plan)
    assert report.kind == "reference"
    assert 0 < report.median_relative_error < 1e-4


def test_another_model_is_not_and_its_first_wrong_layer_is_named(folder, monkeypatch):
    engine, plan = engine_of(folder, folder / "reference")
    true, calls = Attention.__call__, []

    def wrong(self, *args):
        calls.append(self)
        return true(self, *args) * (1.1 if self is engine.model.layers[3].attn else 1.0)

    monkeypatch.setattr(Attention, "__call__", wrong)
    with pytest.raises(ParityError, match="layer 3 is the first whose streams differ") as e:
        canary(engine, plan)
    assert "first at token 0" in str(e.value)
    assert len(calls) >= 6


def test_without_a_trace_the_first_wrong_token_is_named(folder, tmp_path):
    tensors = load_file(folder / "reference")
    logits = tensors["logits"]
    logits[1, 40] *= 1.5
    metadata = _metadata(folder / "reference")
    file = tmp_path / "other"
    save_file({"logits": logits, "input_ids": tensors["input_ids"]}, file, metadata)
    engine, plan = engine_of(folder, file)
    with pytest.raises(ParityError, match=f"worst 0.333, at most 0.001, first at token {N + 40}"):
        canary(engine, plan)


def test_a_record_without_tokens_is_refused(folder, tmp_path):
    file = tmp_path / "old"
    logits = load_file(folder / "reference")["logits"]
    save_file({"logits": logits}, file, _metadata(folder / "reference"))
    engine, plan = engine_of(folder, file)
    with pytest.raises(ConfigError, match="has no input_ids: record it anew"):
        canary(engine, plan)


@pytest.mark.parametrize("broken", ["every decoded token", "what crosses the window"])
def test_without_a_reference_a_decode_that_is_not_the_prefill_is_found(folder, broken, monkeypatch):
    engine, plan = engine_of(folder, None)
    true = Attention.__call__

    def wrong(self, x, batch, *rest):
        first = 0 if broken == "every decoded token" else engine.config.window_size
        is_hit = len(x) == 1 and int(batch.seq_lens[0]) > first
        return true(self, x, batch, *rest) * (1.5 if is_hit else 1.0)

    assert canary(engine, plan).median_relative_error < 1e-5
    monkeypatch.setattr(Attention, "__call__", wrong)
    with pytest.raises(ParityError, match="prefill and decode differ by"):
        canary(engine, plan)


def test_the_topology_names_it(folder):
    reference = folder / "reference"
    topology = load_topology(
        "laptop",
        [f"model.checkpoint={folder / 'checkpoint'}", f"model.reference={reference}"],
    )
    plan = deploy_plan(topology, Checkpoint(folder / "checkpoint").config)
    require_supported(topology)
    assert plan.reference == str(reference)
    missing = load_topology("laptop", ["model.reference=nowhere"])
    with pytest.raises(ConfigError, match=r"model.reference: no file nowhere; v4-ascend parity"):
        require_supported(missing)


def _metadata(file):
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size])["__metadata__"]
