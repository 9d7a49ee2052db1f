"""Faults planted in one operator of one layer are found there, and nowhere else."""

import json
from contextlib import contextmanager

import pytest
import torch
from planting import planted_kernel
from safetensors.torch import save_file
from typer.testing import CliRunner

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.cli.app import app
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.errors import ConfigError
from v4_ascend.ops import OPS
from v4_ascend.runtime.bisect import bisect
from v4_ascend.runtime.compare import EXACT, Record, compare, open_pair, relative_error
from v4_ascend.runtime.parity import Recording, record, write_record

TINY = ModelConfig.read(preset_path("tiny"))
# One index head: many scores are exactly zero, so the tie rule decides which rows are seen.
CONFIG = TINY.model_copy(update={"index_n_heads": 1})
N, PREFILL = 150, 146


class World:
    """Checkpoints, tokens, and records of them with or without a planted fault."""

    def __init__(self, folder):
        self.folder, self._records = folder, {}
        g = torch.Generator().manual_seed(5)
        self.ids = torch.randint(0, CONFIG.vocab_size, (1, N), generator=g)
        self.checkpoints = {}
        for kind in ("fp32", "fp8"):
            write_synthetic(in_format(CONFIG, kind), folder / kind, seed=1)
            self.checkpoints[kind] = Checkpoint(folder / kind)

    def record(self, name, kind="fp32", **changes):
        how = Recording(prefill=PREFILL, kernels="fast", trace=True, **changes)
        file = self.folder / f"{name}-{kind}.safetensors"
        write_record(file, *record(self.checkpoints[kind], self.ids, how, lambda done, total: None))
        return file

    def good(self, kind):
        if kind not in self._records:
            self._records[kind] = self.record("good", kind)
        return self._records[kind]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("records"))


@contextmanager
def planted(name, call, run):
    """Let `run(op, arguments)` stand in for an op, in every call for which `call` holds."""
    op, calls = OPS[name], 0

    def kernel(*args, **kwargs):
        nonlocal calls
        arguments, number = op.bind(*args, **kwargs), calls
        calls += 1
        return run(op, arguments) if call(number, arguments) else op.reference(**arguments)

    kernel.__signature__ = op.signature
    with planted_kernel(op, "cpu", kernel):
        yield


def changed(change):
    """Run the reference on changed arguments."""
    return lambda op, a: op.reference(**(a | change(a)))


def _swap_halves(a):
    half = a["norm_weight"].shape[0]
    swapped = {k: a[k].roll(half, dims=0) for k in ("wkv", "wgate")}
    return swapped | {"ape": a["ape"].roll(half, dims=1)}


def _inverse_scale(a):
    # Multiplied where it should divide: 2^-e for 2^e.
    scale = a["b_scale"]
    return {"b_scale": (254 - scale.view(torch.uint8)).view(scale.dtype)}


def _ties_to_the_higher_row(op, a):
    topk = a.pop("topk")
    scores = OPS["index_scores"].reference(**a)
    best = scores.flip(1).sort(dim=1, descending=True, stable=True)
    ids = scores.shape[1] - 1 - best.indices[:, :topk]
    return ids.masked_fill(best.values[:, :topk] == float("-inf"), -1).int()


LAYERS = TINY.n_layers
CSA = [n for n in range(LAYERS) if TINY.compress_ratios[n] == 4]
HCA = [n for n in range(LAYERS) if TINY.compress_ratios[n] == 128]
NAN = float("nan")


def in_layer(layer):
    """Calls of an op that runs once a layer."""
    return lambda n, a: n % LAYERS == layer


# What is planted: (op, layer it must be found in, weights, calls it is planted in, the fault).
FAULTS = {
    "off-by-one window": (
        *("sparse_attn", 2, "fp32", in_layer(2)),
        changed(lambda a: {"window_size": a["window_size"] - 1}),
    ),
    "missing sink": (
        *("sparse_attn", 1, "fp32", in_layer(1)),
        changed(lambda a: {"sink": torch.full_like(a["sink"], float("-inf"))}),
    ),
    "wrong compress ratio": (
        *("sparse_attn", HCA[0], "fp32", in_layer(HCA[0])),
        changed(lambda a: {"compress_ratio": 2 * a["compress_ratio"]}),
    ),
    "swapped overlap halves": (
        *("compress_kv", CSA[0], "fp32", lambda n, a: a["compress_ratio"] == 4),
        changed(_swap_halves),
    ),
    "transposed comb": (
        *("hc_post", 3, "fp32", lambda n, a: n % (2 * LAYERS) == 7),
        changed(lambda a: {"comb": a["comb"].mT}),
    ),
    "another group's matrix": (
        *("heads_gemm", 2, "fp32", in_layer(2)),
        changed(lambda a: {"weight": a["weight"].roll(1, 0)}),
    ),
    "swapped scale": ("fp8_gemm", 0, "fp8", lambda n, a: n == 1, changed(_inverse_scale)),
    "wrong tie rule": (
        *("index_select", CSA[0], "fp32", lambda n, a: True),
        _ties_to_the_higher_row,
    ),
    "NaN": (
        *("hc_head", LAYERS, "fp32", lambda n, a: n == 0),
        lambda op, a: op.reference(**a).index_fill(0, torch.tensor([7]), NAN),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_localised(world, name):
    op, layer, kind, call, run = FAULTS[name]
    with planted(op, call, run):
        bad = world.record(name.replace(" ", "-"), kind)
    a, b, bounds = open_pair(world.good(kind), bad)
    found = bisect(a, b, bounds)
    assert found is not None
    assert (found.op, found.layer) == (op, layer)
    assert found.before <= found.bound


@pytest.mark.parametrize("kind", ["fp32", "fp8"])
def test_the_same_run_twice_agrees(world, kind):
    a, b, bounds = open_pair(world.good(kind), world.record("again", kind))
    found = compare(a, b, bounds)
    assert (found.max_abs, found.top1, found.problems) == (0.0, N, [])
    assert [d.layer for d in found.layers] == list(range(LAYERS))
    assert bisect(a, b, bounds) is None


def test_other_chunks_agree_within_the_bounds_of_fp32(world):
    a, b, bounds = open_pair(world.good("fp32"), world.record("chunks", chunk=50))
    found = compare(a, b, bounds)
    assert bounds is EXACT
    assert found.problems == []
    assert 0 < found.worst_error < EXACT.worst
    with pytest.raises(ConfigError, match="traces of other steps"):
        bisect(a, b, bounds)


def test_relative_error_counts_nan_and_agrees_on_hidden_rows():
    inf = float("inf")
    x = torch.tensor([[1.0, -inf], [3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[1.0, -inf], [3.0, 4.5], [0.0, 0.0], [1.0, NAN]])
    assert relative_error(x, y).tolist() == [0.0, pytest.approx(0.1), 0.0, inf]


def _cli(*args):
    return CliRunner().invoke(app, ["parity", *map(str, args)])


def test_the_commands_say_it_and_exit_with_5(world):
    op, _, kind, call, run = FAULTS["missing sink"]
    with planted(op, call, run):
        bad = world.record("sink", kind)
    good = world.good(kind)
    assert _cli("compare", good, good).exit_code == 0
    done = _cli("compare", good, bad)
    assert done.exit_code == 5
    assert "they do not agree" in done.stdout
    data = json.loads(_cli("compare", good, bad, "--json").stdout)
    assert data["status"] == "error"
    assert data["data"]["first"] == [0, 0]
    done = _cli("bisect", good, bad)
    assert done.exit_code == 5
    assert "layer 1, sparse_attn" in done.stdout
    done = _cli("bisect", good, good, "--json")
    assert (done.exit_code, json.loads(done.stdout)["data"]) == (0, None)


def _refused(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


def test_what_cannot_be_compared_is_refused(world, tmp_path):
    good = world.good("fp32")
    _refused(lambda: Record(tmp_path / "none"), "cannot be read as safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(1)}, other)
    _refused(lambda: Record(other), "is not what v4-ascend parity record writes")
    _refused(lambda: open_pair(good, world.good("fp8")), "is of other checkpoints than")
    plain = Recording(prefill=N)
    untraced = tmp_path / "untraced.safetensors"
    made = record(world.checkpoints["fp32"], world.ids, plain, lambda done, total: None)
    write_record(untraced, *made)
    a, b, bounds = open_pair(good, untraced)
    assert compare(a, b, bounds).layers == []
    _refused(lambda: bisect(a, b, bounds), "has no trace: record it with --trace")
