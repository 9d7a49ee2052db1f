"""The tiny network on the CUDA backend's kernels, under Triton's interpreter, by the commands."""

import json

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.cli.app import app
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path


def _run(*args):
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    return done.stdout


PREFILL = 4  # enough for a row of CSA; every token takes a second


def test_logits_are_those_of_the_cpus_references(tmp_path):
    config = in_format(ModelConfig.read(preset_path("tiny")), "fp32")
    write_synthetic(config, tmp_path / "tiny", seed=2)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, PREFILL + 1), generator=g)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    for backend in ("cpu", "cuda"):
        _run(
            *("parity", "record", "--checkpoint", tmp_path / "tiny", "--backend", backend),
            *("--input-ids", tmp_path / "ids.safetensors", "--prefill", PREFILL, "--trace"),
            *("--dtype", "fp32", "--out", tmp_path / f"{backend}.safetensors"),
        )
    pair = (tmp_path / "cpu.safetensors", tmp_path / "cuda.safetensors")
    found = json.loads(_run("parity", "compare", *pair, "--json"))["data"]
    assert found["differences"]["backend"] == ["cpu", "cuda"]
    assert found["differences"]["proof"] == ["executed", "interpreted"]
    assert found["worst_error"] < 1e-5
    assert json.loads(_run("parity", "bisect", *pair, "--json"))["data"] is None
