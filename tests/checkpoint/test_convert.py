"""convert: values are what the formats say, whatever happens nothing half is there.

What formats mean is written here again, in numpy, from their definitions.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, make_plan, write_tiny
from safetensors.torch import save_file

from v4_ascend.checkpoint import recoding
from v4_ascend.checkpoint.codecs import Stored, decode, encode
from v4_ascend.checkpoint.convert import Conversion
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.lossless import lossless
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.recoding import Recoding
from v4_ascend.checkpoint.report import read_report
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.checkpoint.sharded import ShardedFolder, open_folder
from v4_ascend.config.inventory import TensorSpec, described
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.precision import FORMATS, recipe_for, recipes
from v4_ascend.config.quant_types import DESCRIPTION, read_types
from v4_ascend.errors import CheckpointError, ConfigError, ShardError

DRILL = Path(__file__).with_name("convert_drill.py")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
QUICK = settings(max_examples=30, deadline=None)
SLOW_FIXTURE = settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stored(kind, n_out, n_in):
    if kind == "plain":
        return Stored.of([TensorSpec("x.weight", "BF16", (n_out, n_in))])
    if kind == "fp4":
        weight = TensorSpec("x.weight", "I8", (n_out, n_in // 2))
        return Stored.of([weight, TensorSpec("x.scale", "F8_E8M0", (n_out, n_in // 32))])
    if kind == "fp8":
        blocks = (-(-n_out // 128), -(-n_in // 128))
        weight = TensorSpec("x.weight", "F8_E4M3", (n_out, n_in))
        return Stored.of([weight, TensorSpec("x.scale", "F8_E8M0", blocks)])
    return Stored.of(list(described(kind, "x", n_out, n_in)))


@st.composite
def fp4_weights(draw):
    """Any codes, scales within `spread` octaves: packed bytes and scale bytes."""
    n_out, n_in = draw(st.sampled_from([128, 200, 256])), draw(st.sampled_from([128, 384]))
    spread = draw(st.integers(0, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    packed = rng.integers(0, 256, (n_out, n_in // 2), np.uint8)
    scale = rng.integers(120 - spread, 121, (n_out, n_in // 32)).astype(np.uint8)
    return packed, scale


def fp4_values(packed, scale):
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    return E2M1[codes] * np.exp2(scale.astype(np.float64) - 127).repeat(32, 1)


def as_parts(packed, scale):
    scale = torch.from_numpy(scale).view(torch.float8_e8m0fnu)
    return {"weight": torch.from_numpy(packed).view(torch.int8), "scale": scale}


@QUICK
@given(fp4_weights())
def test_fp4_to_fp8_keeps_every_value_where_the_spread_allows(weights):
    packed, scale = weights
    want, shape = fp4_values(packed, scale), (len(packed), packed.shape[1] * 2)
    source, target = stored("fp4", *shape), stored("fp8", *shape)
    made = lossless(source, target, as_parts(packed, scale))
    blocks = [
        scale[i : i + 128, j : j + 4].astype(int)
        for i in range(0, scale.shape[0], 128)
        for j in range(0, scale.shape[1], 4)
    ]
    assert (made is not None) == all(b.max() - b.min() <= 11 for b in blocks)
    if made is None:
        made = encode(target, decode(source, as_parts(packed, scale)), None)
    got = decode(target, made).double().numpy()
    if max(b.max() - b.min() for b in blocks) <= 14:
        # e4m3 subnormals hold the rest up to a spread of 2^14, as the format's authors say; our
        # scale follows the largest value, which may be two octaves below the largest scale's.
        assert np.array_equal(got, want)
    assert np.abs(got - want).max() <= 2.0**-9 * 6 * 2.0 ** (int(scale.max()) - 127)


@QUICK
@given(fp4_weights())
def test_fp4_to_mxfp8_and_back_is_bit_exact(weights):
    packed, scale = weights
    shape = (len(packed), packed.shape[1] * 2)
    source, target = stored("fp4", *shape), stored("W8A8_MXFP8", *shape)
    made = lossless(source, target, as_parts(packed, scale))
    want = fp4_values(packed, scale)
    assert np.array_equal(decode(target, made).double().numpy(), want)
    again = encode(source, decode(target, made), None)
    assert np.array_equal(decode(source, again).double().numpy(), want)


@QUICK
@given(st.integers(0, 2**32), st.sampled_from([128, 200]), st.sampled_from([128, 256]))
def test_fp8_to_mxfp8_and_bf16_and_back(seed, n_out, n_in):
    g = torch.Generator().manual_seed(seed)
    fp8, mx = stored("fp8", n_out, n_in), stored("W8A8_MXFP8", n_out, n_in)
    parts = encode(fp8, torch.randn(n_out, n_in, generator=g), None)
    made = lossless(fp8, mx, parts)
    assert torch.equal(made["weight"].view(torch.uint8), parts["weight"].view(torch.uint8))
    x = decode(fp8, parts)
    assert torch.equal(decode(mx, made), x)
    # A block whose largest value was rounded to a power of two may get half the scale.
    assert torch.equal(decode(fp8, encode(fp8, decode(mx, made), None)), x)
    plain = stored("plain", n_out, n_in)
    assert torch.equal(decode(plain, encode(plain, x, None)), x)


@QUICK
@given(st.integers(0, 2**32), st.sampled_from([(8, 127, "W8A8_DYNAMIC"), (4, 7, "W4A8_DYNAMIC")]))
def test_integers_are_the_nearest_and_the_bias_is_eight_times_their_sum(seed, how):
    bits, most, kind = how
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 64)).astype(np.float32) * rng.uniform(0.01, 3, (6, 1))
    x = x.astype(np.float32)
    x[3] = 0
    target = stored(kind, 6, 64)
    made = encode(target, torch.from_numpy(x), None)
    scale = made["weight_scale"].numpy()
    largest = np.abs(x).max(1, keepdims=True)
    assert np.allclose(scale[largest > 0], largest[largest > 0] / most, rtol=1e-6)
    weight = made["weight"].numpy().astype(np.int32)
    if bits == 4:  # two output channels a byte, the even one low
        low, high = ((weight & 15) ^ 8) - 8, weight >> 4
        weight = np.stack([low, high], 1).reshape(6, 64)
        bias = 8 * (weight * scale).sum(1, keepdims=True)
        assert np.allclose(made["scale_bias"].sum(1, keepdims=True), bias, rtol=1e-5, atol=1e-6)
    assert np.array_equal(weight, np.rint(x / scale).astype(np.int32))
    assert np.abs(weight * scale - x).max() <= scale.max() * 0.5001
    assert not made["weight_offset"].any()
    assert np.array_equal(decode(target, made).numpy(), (weight * scale).astype(np.float32))


def test_calibration_lowers_the_error_it_weighs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 256, generator=g) * torch.exp(torch.randn(32, 256, generator=g))
    importance = torch.rand(256, generator=g) ** 8
    target = stored("W4A8_DYNAMIC", 32, 256)

    def error(made):
        return float(((decode(target, made) - x).square() @ importance).sum())

    assert error(encode(target, x, importance)) < 0.8 * error(encode(target, x, None))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("convert") / "checkpoint")


def job(path, to, **how):
    folder = CheckpointFolder(path)
    return Conversion(folder, Recoding(folder, to, recipe_for(to, None, None), **how))


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("to", FORMATS)
def test_a_converted_checkpoint_is_complete_and_says_what_it_did(tmp_path, checkpoint, to):
    source = Checkpoint(checkpoint)
    done = job(checkpoint, to).run(tmp_path / "out")
    made = Checkpoint(tmp_path / "out")
    made.require_complete()
    assert made.config == job(checkpoint, to).recoding.config
    report = read_report(tmp_path / "out")
    assert report.is_lossless == (to in ("mxfp4", "fp8", "mxfp8", "bf16"))
    assert (to == "mxfp4") == (report.weights == ())
    assert done.manifest.format == to
    name = "layers.1.ffn.experts.2.w2"
    packed = source.tensor(f"{name}.weight").view(torch.uint8).numpy()
    scale = source.tensor(f"{name}.scale").view(torch.uint8).numpy()
    want = fp4_values(packed, scale)
    specs = [made.headers[n] for n in made.headers if n.startswith(f"{name}.")]
    parts = {h.name.removeprefix(f"{name}."): made.tensor(h.name) for h in specs}
    got = decode(Stored.of(specs), parts).double().numpy()
    if report.is_lossless:
        assert np.array_equal(got, want)
    else:
        (told,) = [w for w in report.weights if w.name == f"{name}.weight"]
        error = got - want
        assert told.values == want.size
        assert told.n_changed == np.count_nonzero(error)
        assert told.max_error == pytest.approx(np.abs(error).max(), rel=1e-4)
        assert told.rms_error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
        assert told.rms == pytest.approx(np.sqrt((want**2).mean()), rel=1e-4)


def test_the_description_names_every_tensor_as_vllm_ascend_looks_it_up(tmp_path, checkpoint):
    job(checkpoint, "w4a8").run(tmp_path / "out")
    raw = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    names = set(CheckpointFolder(tmp_path / "out").headers)
    assert names == raw.keys() - {"model_quant_type", "version", "group_size"}
    assert (raw["model_quant_type"], raw["version"], raw["group_size"]) == (
        "W4A8_DYNAMIC",
        "1.0.0",
        0,
    )
    assert raw["layers.0.attn.wq_b.weight"] == raw["layers.0.attn.wq_b.weight_scale"]
    assert raw["layers.0.attn.wq_b.weight"] == "W8A8_DYNAMIC"
    assert raw["layers.0.attn.wo_a.weight"] == raw["embed.weight"] == "FLOAT"
    assert raw["mtp.0.ffn.experts.0.w1.scale_bias"] == "W4A8_DYNAMIC"
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_description_that_mixes_types_of_one_kind_is_refused(tmp_path):
    file = tmp_path / DESCRIPTION
    entries = {"layers.0.attn.wq_b.weight": "W8A8_DYNAMIC", "layers.1.attn.wq_b.weight": "FLOAT"}
    file.write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"layers\.1\.attn\.wq_b\.weight is FLOAT, another"):
        read_types(file)
    file.write_text(json.dumps({"layers.0.attn.wq_b.weight": "W8A8"}))
    with pytest.raises(ConfigError, match=r"is 'W8A8'; supported: FLOAT, W8A8_DYNAMIC"):
        read_types(file)


def test_a_recipe_is_chosen_by_chip_and_name():
    assert recipe_for("w8a8", "a2", "eco-tech").name == "eco-tech"
    assert recipe_for("fp8", None, None) is None
    with pytest.raises(ConfigError, match="no recipe to w8a8 for 950; there is cann-recipes"):
        recipe_for("w8a8", "950", None)
    with pytest.raises(ConfigError, match="--soc: a2: bf16 is the same for every chip"):
        recipe_for("bf16", "a2", None)
    assert all(r.source for r in recipes())


@pytest.mark.parametrize("to", ["w8a8", "w4a8", "mxfp8"])
def test_every_recipe_holds_for_the_published_models(to):
    for name in ("v4_flash_config", "v4_pro_config"):
        config = ModelConfig.read(Path(__file__).parents[1] / "data" / f"{name}.json")
        for recipe in (r for r in recipes() if r.format == to):
            made = recoding.in_weights(config, to, recipe)
            assert dict(made.quant_types) == recipe.weights


@SLOW_FIXTURE
@given(layout=st.sampled_from([LAYOUTS[n] for n in ("tp2", "ep2", "pp2-tp2-ep2")]),
       to=st.sampled_from(["fp8", "w8a8", "w4a8"]))  # fmt: skip
def test_shard_to_is_convert_and_then_shard(tmp_path_factory, checkpoint, layout, to):
    work = tmp_path_factory.mktemp("both")
    plan = make_plan(checkpoint, layout)
    folder = CheckpointFolder(checkpoint)
    one = Recoding(folder, to, recipe_for(to, None, None))
    Sharding(folder, plan, recoding=one).run(work / "one-pass")
    job(checkpoint, to).run(work / "converted")
    Sharding(CheckpointFolder(work / "converted"), plan).run(work / "two-passes")
    a, b = ShardedFolder(work / "one-pass"), ShardedFolder(work / "two-passes")
    assert a.manifest.layout == b.manifest.layout
    assert [f.digest for f in a.manifest.files] == [f.digest for f in b.manifest.files]
    assert not list(a.damage(lambda n: None))
    shutil.rmtree(work)


def test_rows_at_a_time_make_no_difference(tmp_path, checkpoint, monkeypatch):
    job(checkpoint, "w4a8").run(tmp_path / "a", workers=1)
    monkeypatch.setattr(recoding, "CHUNK_VALUES", 1)
    job(checkpoint, "w4a8").run(tmp_path / "b", workers=3)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def run_drill(tmp_path, checkpoint, n):
    command = [sys.executable, str(DRILL), str(checkpoint), str(tmp_path), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["failed"] == []


def test_killed_at_random_points_it_ends_with_the_same_bytes(tmp_path, checkpoint):
    run_drill(tmp_path, checkpoint, 6)


@pytest.mark.slow
def test_killed_at_100_random_points_it_ends_with_the_same_bytes(tmp_path, checkpoint):
    run_drill(tmp_path, checkpoint, 100)


def test_a_flipped_bit_is_made_again_and_verify_names_it(tmp_path, checkpoint):
    out = tmp_path / "out"
    job(checkpoint, "w8a8").run(out)
    want, file = files_of(out), sorted(out.glob("*.safetensors"))[2]
    raw = bytearray(file.read_bytes())
    raw[-1000] ^= 4
    file.write_bytes(raw)
    code = "from v4_ascend.cli import main; main()"
    verify = [sys.executable, "-c", code, "inspect", str(out), "--verify"]
    said = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert file.name in said.stdout
    assert "CRC-32" in said.stdout
    again = job(checkpoint, "w8a8").run(out, resume=True)
    assert again.n_kept == len(again.manifest.files) - 1
    assert files_of(out) == want


def test_a_full_disk_and_a_denied_file_are_errors_and_nothing_half_is_whole(
    tmp_path, checkpoint, monkeypatch
):
    out, real, n = tmp_path / "out", os.pwrite, [0]

    def full(fd, data, at):
        n[0] += 1
        if n[0] > 300:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", full)
        with pytest.raises(ShardError, match=r"model-.*\.partial: No space left on device"):
            job(checkpoint, "w8a8").run(out)
    assert not (out / "model.safetensors.index.json").exists()
    assert not list(out.glob("model-*.partial"))
    with pytest.raises(CheckpointError, match="convert has not ended there; go on with --resume"):
        open_folder(out)
    real_open = os.open

    def denied(path, *args, **kwargs):
        if "checkpoint/model-" in str(path):  # of those that are left: which depends on threads
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real_open(path, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(os, "open", denied)
        with pytest.raises(ShardError, match=r"model-\d+.*: Permission denied"):
            job(checkpoint, "w8a8").run(out, resume=True)
    job(checkpoint, "w8a8").run(out, resume=True)
    CheckpointFolder(out).require_complete()


def test_a_source_that_changes_is_an_error_that_names_it(tmp_path, checkpoint):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    changed = []

    def progress(done, total):
        if done and not changed:
            changed.append(os.utime(source / "model-00003-of-00009.safetensors", ns=(1, 1)))

    with pytest.raises(CheckpointError, match=r"model-00003.*: changed while"):
        job(source, "fp8").run(tmp_path / "out", workers=1, progress=progress)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_resume_goes_on_with_the_same_work_alone(tmp_path, checkpoint):
    out = tmp_path / "out"
    job(checkpoint, "w8a8").run(out)
    with pytest.raises(ShardError, match="is in the format w8a8, --to is fp8"):
        job(checkpoint, "fp8").run(out, resume=True)
    amax = tmp_path / "inputs.safetensors"
    save_file({"layers.0.attn.wq_b": torch.ones(128)}, amax)
    with pytest.raises(ShardError, match="with another recipe, calibration or configuration"):
        job(checkpoint, "w8a8", calibration=amax).run(out, resume=True)
    save_file({"layers.0.attn.wq_b": torch.ones(7)}, amax)
    with pytest.raises(ConfigError, match="wq_b: must be 128 numbers of 0 or more"):
        job(checkpoint, "w8a8", calibration=amax)
    save_file({"layers.0.attn.wx": torch.ones(7)}, amax)
    with pytest.raises(ConfigError, match=r"attn\.wx is no linear layer"):
        job(checkpoint, "w8a8", calibration=amax)
