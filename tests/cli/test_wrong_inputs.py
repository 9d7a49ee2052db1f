"""What users get wrong in `ops`, `verify` and `parity`: one clear line, and the exit code."""

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.cli import main
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path

TINY = ModelConfig.read(preset_path("tiny"))
GOOD_IDS = torch.arange(10).view(1, 10)
HOW = ("--dtype", "fp32", "--quant-sim", "off")


@pytest.fixture
def command(capsys, monkeypatch):
    """Return a function: run a command line in this process; its exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["v4-ascend", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, another, tokens, a traced record of each, and a file that is none of these."""
    folder = tmp_path_factory.mktemp("wrong")
    write_synthetic(in_format(TINY, "fp32"), folder / "tiny", seed=0)
    other = TINY.model_copy(update={"hc_sinkhorn_iters": TINY.hc_sinkhorn_iters - 1})
    write_synthetic(in_format(other, "fp32"), folder / "other", seed=0)
    (folder / "file").write_text("not a tensor in it")
    (folder / "cut").write_bytes(b"\x80" + bytes(7) + b"{")
    for name, ids in {
        "ids": GOOD_IDS,
        "fp32": GOOD_IDS.float(),
        "int32": GOOD_IDS.int(),
        "flat": GOOD_IDS[0],
        "empty": GOOD_IDS[:, :0],
        "negative": GOOD_IDS - 1,
        "high": GOOD_IDS + TINY.vocab_size,
    }.items():
        save_file({"input_ids": ids}, folder / name)
    save_file({"tokens": GOOD_IDS}, folder / "renamed")
    from v4_ascend.checkpoint.reader import Checkpoint
    from v4_ascend.runtime.parity import Recording, record, write_record

    for name in ("tiny", "other"):
        how = Recording(prefill=8, dtype="fp32", quant_sim="off", trace=True)
        made = record(Checkpoint(folder / name), GOOD_IDS, how, lambda done, total: None)
        write_record(folder / f"{name}.record", *made)
    return folder


PARITY_IDS = ("parity", "record", "--checkpoint", "tiny", "--out", "out")
PARITY = (*PARITY_IDS, "--input-ids", "ids")
CPU = ("verify", "--backend", "cpu", "--op", "rope")
WRONG = [
    (("ops", "--backend", "tpu"), 2, "--backend: no backend 'tpu'; there is cpu"),
    (("ops", "--backend", ""), 2, "--backend: no backend ''"),
    (("ops", "--soc", "950dt"), 2, "--soc: needs --backend"),
    (("ops", "--backend", "ascend", "--soc", "a7"), 2, "--soc: no chip 'a7'; there is a2"),
    (("ops", "--backend", "ascend", "--soc", "950xx"), 2, "--soc: no chip '950xx'"),
    (("ops", "--backend", "cpu", "--soc", "a2"), 2, "does not tell chips apart"),
    (("ops", "--bakend", "cpu"), 2, "No such option: --bakend"),
    (("op",), 2, "No such command 'op'"),
    (("verify", "--op", "ropes"), 2, "--op: no operator 'ropes'; there is act_quant"),
    ((*CPU, "--case", "nope"), 2, "--case: no tiny case of rope has 'nope' in its name"),
    ((*CPU, "--shapes", "huge"), 2, "'huge' is not one of 'tiny', 'flash', 'pro'"),
    ((*CPU, "--soc", "a2"), 2, "does not tell chips apart"),
    ((*CPU, "--emulate"), 2, "--emulate: emulates an NPU: needs --backend ascend"),
    ((*CPU, "--report", "file"), 2, "--report: cannot write to file: File exists"),
    ((*CPU, "--report", "file/in"), 2, "--report: cannot write to file/in: Not a directory"),
    ((*CPU, "--report", "/proc/report"), 2, "--report: cannot write to /proc/report"),
    (("verify", "--backend", "mindspore"), 4, "backend mindspore: mindspore is not installed"),
    (("verify", "--backend", "ascend"), 4, "backend ascend: torch_npu is not installed"),
    ((*PARITY, "--prefill", "0"), 2, "--prefill: 0 must be between 1 and 10 tokens"),
    ((*PARITY, "--prefill", "11"), 2, "--prefill: 11 must be between 1 and 10 tokens"),
    ((*PARITY, "--prefill", "two"), 2, "'--prefill'"),
    (PARITY, 2, "Missing option '--prefill'"),
    ((*PARITY, "--prefill", "4", "--chunk", "0"), 2, "--chunk: 0 must be at least 1"),
    ((*PARITY, "--prefill", "4", "--dtype", "fp16"), 2, "'fp16' is not one of 'fp32', 'bf16'"),
    ((*PARITY, "--prefill", "4", "--backend", "tpu"), 2, "no backend 'tpu'"),
    ((*PARITY, "--prefill", "4", "--backend", "mindspore"), 4, "mindspore is not installed"),
    ((*PARITY, "--prefill", "4", "--checkpoint", "nowhere"), 1, "nowhere: no such folder"),
    ((*PARITY, "--prefill", "4", "--checkpoint", "file"), 1, "file: no such folder"),
    ((*PARITY, "--prefill", "4", "--out", "nowhere/out"), 2, "--out: no folder"),
    ((*PARITY, "--prefill", "4", "--out", "tiny"), 2, "--out: tiny is a folder, must be a file"),
    ((*PARITY, "--prefill", "4", "--out", "/proc/out"), 2, "--out: cannot write to /proc"),
    *[
        ((*PARITY_IDS, "--prefill", "4", "--input-ids", name), 2, f"{name}: {says}")
        for name, says in (
            ("nowhere", "cannot be read as safetensors: No such file"),
            ("file", "cannot be read as safetensors"),
            ("tiny", "cannot be read as safetensors"),
            ("renamed", "has no input_ids, only ['tokens']"),
            ("fp32", "input_ids is torch.float32 [1, 10], must be int64 [n, s]"),
            ("int32", "input_ids is torch.int32"),
            ("flat", "input_ids is torch.int64 [10], must be"),
            ("empty", "input_ids is torch.int64 [1, 0], must be"),
            ("negative", "input_ids has -1..8, vocabulary: 512"),
            ("high", "input_ids has 512..521, vocabulary: 512"),
        )
    ],
    (("parity", "compare", "tiny.record"), 2, "Missing argument 'b'"),
    (("parity", "compare", "tiny.record", "tiny.record", "--median", "-1"), 2, "--median: -1.0"),
    (("parity", "compare", "tiny.record", "tiny.record", "--worst", "nan"), 2, "--worst: nan"),
]


def _id(wrong):
    return "-".join(wrong).replace("/", "_")


@pytest.mark.parametrize(("args", "code", "says"), WRONG, ids=[_id(w[0]) for w in WRONG])
def test_a_wrong_input_is_one_clear_line(command, folder, monkeypatch, args, code, says):
    monkeypatch.chdir(folder)
    found, out, err = command(*args)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (folder / "out").exists()


def _without(*keys):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in keys}


def _logits(change):
    return lambda tensors: tensors | {"logits": change(tensors["logits"]).contiguous()}


FIRST, STREAMS = "trace/00000/000/01.rms_norm.0", "trace/00000/001/streams"
DAMAGED = {
    "cut": (None, "cannot be read as safetensors"),
    "without logits": (_without("logits"), "it has no logits"),
    "logits of two dims": (_logits(lambda x: x[0]), "logits are F32 [10, 512], must be F32 [n, s"),
    "no position": (_logits(lambda x: x[:, :0]), "logits are F32 [1, 0, 512]"),
    "one word": (_logits(lambda x: x[..., :1]), "logits are F32 [1, 10, 1]"),
    "logits in bf16": (_logits(lambda x: x.bfloat16()), "logits are BF16"),
    "an odd name": (lambda t: t | {"trace/odd": torch.ones(1)}, "trace/odd is no name of a trace"),
    "of another checkpoint": (None, "is of other checkpoints than tiny.record"),
}
# What only one of the commands looks at.
COMPARED = {
    "fewer positions": (_logits(lambda x: x[:, :3]), "logits [1, 3, 512], tiny.record has"),
    "fewer rows": (lambda t: t | {STREAMS: t[STREAMS][:1].clone()}, "behind layer 1, tiny.record"),
    "narrower": (lambda t: t | {STREAMS: t[STREAMS][:, :1].clone()}, "has other widths than"),
}
BISECTED = {
    "untraced": (lambda t: {"logits": t["logits"]}, "has no trace: record it with --trace"),
    "one call fewer": (_without(FIRST), f"has no {FIRST}: the runs made other calls"),
}


def _damage(folder, name, change):
    """A record changed: the name of its file in the folder."""
    if name in ("cut", "of another checkpoint"):
        return {"cut": "cut", "of another checkpoint": "other.record"}[name]
    file = folder / f"{name}.damaged"
    with safe_open(folder / "tiny.record", "pt") as whole:
        metadata = whole.metadata()
    save_file(change(load_file(folder / "tiny.record")), file, metadata=metadata)
    return file.name


@pytest.mark.parametrize(
    ("what", "name"),
    [(w, n) for w in ("compare", "bisect") for n in DAMAGED]
    + [("compare", n) for n in COMPARED]
    + [("bisect", n) for n in BISECTED],
)
def test_a_damaged_record_is_one_clear_line(command, folder, monkeypatch, what, name):
    monkeypatch.chdir(folder)
    change, says = (DAMAGED | COMPARED | BISECTED)[name]
    code, out, err = command("parity", what, "tiny.record", _damage(folder, name, change))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_calls_that_only_the_judged_run_made_are_noticed(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    fewer = _damage(folder, "one call fewer", _without(FIRST))
    code, _, err = command("parity", "bisect", fewer, "tiny.record")
    assert (code, err) == (2, f"error: {fewer}: has no {FIRST}: the runs made other calls\n")


@pytest.mark.parametrize("key", ["dtype", "quant_sim", "mode", "checkpoint_digest"])
@pytest.mark.parametrize("what", ["compare", "bisect"])
def test_metadata_that_is_missing_is_named(command, folder, monkeypatch, what, key):
    monkeypatch.chdir(folder)
    with safe_open("tiny.record", "pt") as whole:
        metadata = {k: v for k, v in whole.metadata().items() if k != key}
    save_file(load_file("tiny.record"), "partial", metadata=metadata)
    code, _, err = command("parity", what, "tiny.record", "partial")
    assert (code, err.count("\n")) == (2, 1)
    assert f"partial: is not what v4-ascend parity record writes: its metadata has no {key}" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_do_not_agree(command, folder, monkeypatch, value):
    """Also where every traced operator agrees: a trace is of the first sequence alone."""
    monkeypatch.chdir(folder)
    wrong = _damage(folder, f"{value}", _logits(lambda x: torch.full_like(x, value)))
    for a, b in (("tiny.record", wrong), (wrong, "tiny.record"), (wrong, wrong)):
        for what in ("compare", "bisect"):
            code, out, err = command("parity", what, a, b)
            assert (code, err) == (5, ""), (what, a, b)
            assert "median error" in out


def test_help_of_a_group_is_no_error(command):
    code, _, err = command("parity")
    assert code == 2
    assert "error: " not in err
