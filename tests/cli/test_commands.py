"""Commands as a user types them, in processes of their own."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def run(*args, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "v4_ascend", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("init") / "tiny"
    done = run("init", "--preset", "tiny", "--format", "fp32", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": torch.arange(40).view(2, 20)}, file)
    return file


WAITS = """
import os
from v4_ascend.cli import app
app.app = lambda **kwargs: print("torch" in app.sys.modules, os.environ["OMP_WAIT_POLICY"])
app.main()
"""


@pytest.mark.parametrize(("told", "holds"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_sleep_unless_told_otherwise(told, holds, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", told)
    said = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, check=True)
    assert said.stdout == f"False {holds}\n"


def test_help_comes_without_torch():
    code = "import sys; from v4_ascend.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_is_quick():
    assert min(_cpu_seconds("--help") for _ in range(3)) < 0.5


def test_a_group_without_a_command_says_all_of_what_its_commands_do():
    done = run("parity")
    assert (done.returncode, done.stdout) == (2, "")
    assert " parity [OPTIONS] COMMAND" in done.stderr.splitlines()[0]
    assert "..." not in done.stderr.partition("Commands:")[2]


def _cpu_seconds(*args):
    """Processor time of a command: unlike the clock, it does not see what else runs here."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(*args).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_inspect_reports_json(tiny):
    done = run("inspect", tiny, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["status"], report["diagnostics"]) == (0, "ok", [])
    assert report["data"]["layers"] == {"swa": 1, "csa": 3, "hca": 2}


def test_inspect_of_an_incomplete_checkpoint_exits_1_and_names_what_is_missing(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    config["num_hash_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    done = run("inspect", folder, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["data"]["missing"] == ["layers.1.ffn.gate.bias"]
    assert json.loads(done.stdout)["data"]["unexpected"] == ["layers.1.ffn.gate.tid2eid"]


def test_inspect_prints_what_there_is_and_what_is_wrong(tiny, tmp_path):
    done = run("inspect", tiny)
    assert done.returncode == 0
    assert "DeepSeek-V4, fp32, experts fp32" in done.stdout
    assert "layers: 1 SWA, 3 CSA, 2 HCA, 1 MTP" in done.stdout
    assert "complete: every tensor is there, none is unexpected" in done.stdout

    config = json.loads((tiny / "config.json").read_text()) | {"num_hash_layers": 1, "new": 1}
    folder = shutil.copytree(tiny, tmp_path / "broken")
    (folder / "config.json").write_text(json.dumps(config))
    done = run("inspect", folder)
    assert done.returncode == 1
    assert "layers.1.ffn.gate.bias is missing" in done.stdout
    assert "config.json has 'new', which V4 does not know" in done.stdout


def test_inspect_reports_json_of_what_cannot_be_opened_too():
    done = run("inspect", "/nowhere", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["status"], report["data"]) == (1, "error", None)
    assert "/nowhere: no such folder" in report["diagnostics"][0]


def test_parity_record_writes_logits_and_how_they_came_about(tiny, ids, tmp_path):
    out = tmp_path / "record.safetensors"
    done = run(
        *("parity", "record", "--checkpoint", tiny, "--input-ids", ids),
        *("--prefill", 15, "--chunk", 4, "--out", out),
    )
    assert done.returncode == 0, done.stderr
    assert load_file(out)["logits"].shape == (2, 20, 512)
    with safe_open(out, framework="pt") as f:
        metadata = f.metadata()
    assert metadata["dtype"] == "fp32"
    assert metadata["quant_sim"] == "off"
    assert json.loads(metadata["mode"]) == {"prefill": 15, "chunk": 4}
    assert len(metadata["checkpoint_digest"]) == len(metadata["input_ids_digest"]) == 64


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["inspect", "/nowhere"], 1, "no such folder"),
        (["init", "--out", "x"], 2, "give either --preset or --config"),
        (
            ["init", "--preset", "tinny", "--out", "x"],
            2,
            "no preset 'tinny'; there are ascend-slice",
        ),
        (["init", "--preset", "tiny", "--format", "fp9", "--out", "x"], 2, "fp9"),
        (["deplyo"], 2, "deplyo"),
        (["parity", "record", "--prefill", "0"], 2, "--checkpoint"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_wrong_input_is_one_clear_error(args, code, says, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "v4_ascend", *args],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--prefill", 0, "--prefill: 0 must be between 1 and 20"),
        ("--prefill", 21, "--prefill: 21 must be between 1 and 20"),
        ("--chunk", 0, "--chunk: 0 must be at least 1"),
        ("--input-ids", "/nowhere", "/nowhere: cannot be read as safetensors"),
        ("--out", "/nowhere/x", "--out: no folder /nowhere"),
        ("--backend", "tpu", "--backend: no backend 'tpu'; there is cpu"),
    ],
)
def test_parity_record_refuses_what_cannot_be(tiny, ids, tmp_path, option, value, says):
    options = {
        "--checkpoint": tiny,
        "--input-ids": ids,
        "--prefill": 10,
        "--out": tmp_path / "o",
        option: value,
    }
    done = run("parity", "record", *(a for pair in options.items() for a in pair))
    assert done.returncode == 2
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--conformance", "is of engine vllm; with engine native take v4-ascend conformance URL"),
        ("--json", "goes with --dry-run"),
    ],
)
def test_an_option_that_does_not_apply_is_refused_and_not_ignored(option, says):
    done = run("deploy", "--topology", "laptop", option)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {option}: {says}")
