"""What C++ converts is what plain torch converts: every byte, and what is said of the errors."""

import _ctypes
import importlib.machinery
import json
import re
import shutil
from itertools import product

import pytest
import torch
from layouts import make_plan, write_tiny
from typer.testing import CliRunner

from v4_ascend.checkpoint import compiled
from v4_ascend.checkpoint.codecs import Stored
from v4_ascend.checkpoint.convert import Conversion
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.reader import TORCH_DTYPES
from v4_ascend.checkpoint.recoding import Recoding
from v4_ascend.checkpoint.row_conversion import plain
from v4_ascend.cli.app import app
from v4_ascend.config.inventory import TensorSpec, described
from v4_ascend.config.precision import recipe_for
from v4_ascend.ops import formats

SOURCES = ("fp4", "fp8", "fp8-f32", "W8A8_MXFP8", "bf16", "f32")
TARGETS = ("fp8", "fp8-f32", "W8A8_MXFP8", "bf16", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
DONE = {("fp4", "fp8"), ("fp4", "fp8-f32"), ("fp4", "W8A8_MXFP8")} | {
    (s, t) for s in SOURCES for t in ("bf16", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
}
SHAPES = [(128, 128), (200, 384), (256, 96)]


def stored(kind, n_out, n_in):
    blocks = (-(-n_out // 128), -(-n_in // 128))
    specs = {
        "fp4": [("weight", "I8", (n_out, n_in // 2)), ("scale", "F8_E8M0", (n_out, n_in // 32))],
        "fp8": [("weight", "F8_E4M3", (n_out, n_in)), ("scale", "F8_E8M0", blocks)],
        "fp8-f32": [("weight", "F8_E4M3", (n_out, n_in)), ("scale", "F32", blocks)],
        "bf16": [("weight", "BF16", (n_out, n_in))],
        "f32": [("weight", "F32", (n_out, n_in))],
    }
    if kind not in specs:
        return Stored.of(list(described(kind, "x", n_out, n_in)))
    return Stored.of([TensorSpec(f"x.{e}", d, s) for e, d, s in specs[kind]])


def any_parts(form, seed, spread):
    """Any bits that are numbers; scales within `spread` octaves, one row all zero."""
    g = torch.Generator().manual_seed(seed)
    parts = {}
    for ending, spec in form.specs.items():
        dtype = TORCH_DTYPES[spec.dtype]
        if ending == "weight" and dtype in (torch.bfloat16, torch.float32):
            wide = torch.exp(torch.randn(spec.shape, generator=g))
            x = torch.randn(spec.shape, generator=g) * wide
            x[0], x[-1, 0] = 0, -0.0
            # Half of what is fp32 may be what BF16 holds.
            parts[ending] = (x.bfloat16() if spread < 4 else x).to(dtype)
        elif ending == "weight":
            x = torch.randint(0, 256, spec.shape, generator=g, dtype=torch.uint8)
            if dtype == formats.FP8:
                x[x & 0x7F == 0x7F] = 0x80  # no NaN, but a negative zero
            x[0] = 0
            parts[ending] = x.view(dtype)
        else:
            e = torch.randint(127 - spread, 128, spec.shape, generator=g, dtype=torch.uint8)
            parts[ending] = torch.exp2(e.float() - 127) if dtype == torch.float32 else e.view(dtype)
    return parts


def require_same(got, want):
    made, errors = got
    wanted, known = want
    assert made.keys() == wanted.keys()
    for name, x in wanted.items():
        assert made[name].dtype == x.dtype
        assert made[name].shape == x.shape
        raw = made[name].contiguous().view(torch.uint8), x.contiguous().view(torch.uint8)
        assert torch.equal(*raw), name
    assert (errors is None) == (known is None)
    if errors is not None:
        assert torch.equal(errors.n_changed, known.n_changed)
        assert torch.equal(errors.largest, known.largest)
        for a, b in ((errors.of_errors, known.of_errors), (errors.of_values, known.of_values)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_it_was_built_where_there_is_a_compiler():
    assert compiled.is_built() == any(map(shutil.which, ("g++", "c++")))
    assert compiled.is_built() == (compiled.MISSING is None)


@pytest.mark.parametrize(
    ("library", "why"),
    [
        (None, "the compiled conversion was not built: v4-ascend was installed without g++"),
        ("damaged", r"the compiled conversion does not load: .*_recode.so: (file too short|inv)"),
        ("another", "the compiled conversion does not load: .*undefined symbol: fp4_to_fp8"),
    ],
)
def test_a_library_that_cannot_be_used_says_why(tmp_path, monkeypatch, library, why):
    file = tmp_path / "_recode.so"
    if library == "damaged":
        file.write_bytes(b"\x7fELF")
    if library == "another":
        file.symlink_to(_ctypes.__file__)
    spec = importlib.machinery.ModuleSpec("x", None, origin=str(file))
    monkeypatch.setattr(compiled, "find_spec", lambda name: spec if library else None)
    functions, missing = compiled._load()
    assert functions is None
    assert re.fullmatch(why + ".*", missing)
    monkeypatch.setattr(compiled, "_functions", functions)
    monkeypatch.setattr(compiled, "MISSING", missing)
    with pytest.raises(RuntimeError, match=why):
        compiled._call("fp4_to_fp8")


@pytest.mark.parametrize("command", ["convert", "shard"])
def test_who_converts_without_it_is_told_why(tmp_path, checkpoint, monkeypatch, command):
    monkeypatch.setattr(compiled, "_functions", None)
    monkeypatch.setattr(compiled, "MISSING", "no library today")
    make_plan(checkpoint, {}).write(tmp_path / "plan.json")
    words = ["--plan", tmp_path / "plan.json"] if command == "shard" else []
    words = [command, checkpoint, *words, "--to", "fp8", "--out", tmp_path / "out", "--json"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    told = "no library today; plain torch converts, to the same bytes and more slowly"
    assert f"warning: {told}\n" in done.stderr
    assert json.loads(done.stdout)["diagnostics"] == [told]


# What has the format already is copied.
@pytest.mark.parametrize(
    ("source", "target"), [p for p in product(SOURCES, TARGETS) if len(set(p)) == 2]
)
def test_it_makes_the_bytes_of_plain_torch(source, target):
    n_made = 0
    for n_out, n_in in SHAPES:
        a, b = stored(source, n_out, n_in), stored(target, n_out, n_in)
        for seed, spread in enumerate((0, 3, 11, 12, 30, 125)):
            parts = any_parts(a, seed, spread)
            for columns in (slice(None), slice(n_in // 96 * 32, None)):
                want = plain(a, b, parts, None, columns)
                got = compiled.recoded(a, b, parts, columns)
                assert got is None or (source, target) in DONE
                if got is not None:
                    require_same(got, want)
                    n_made += 1
                elif (source, target) in DONE and target == "fp8":
                    assert spread > 11 or want[1] is not None
    assert (n_made > 0) == (compiled.is_built() and (source, target) in DONE)


def test_every_code_at_every_scale_is_what_it_was():
    """All 16 codes under all scales that are numbers: to BF16 where BF16 has them."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 2)[:, :512]
    scale = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 32)
    source, target = stored("fp4", 255, 1024), stored("bf16", 255, 1024)
    for row in range(255):
        parts = {
            "weight": codes[row : row + 1].view(torch.int8),
            "scale": scale[row : row + 1].view(formats.E8M0),
        }
        want = plain(source, target, parts, None, slice(None))
        got = compiled.recoded(source, target, parts, slice(None))
        if got is not None:
            require_same(got, want)
        # The largest is 6 times the scale, the smallest half of it; BF16 ends at 2^128.
        assert (got is not None) == (compiled.is_built() and row - 127 + 3 <= 128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("compiled") / "checkpoint")


@pytest.mark.parametrize("to", ["fp8", "mxfp8", "bf16", "w8a8", "w4a8"])
def test_a_converted_checkpoint_is_the_same_with_it_and_without(
    tmp_path, checkpoint, monkeypatch, to
):
    folders = []
    for functions in (compiled._functions, None):
        monkeypatch.setattr(compiled, "_functions", functions)
        out = tmp_path / str(len(folders))
        folder = CheckpointFolder(checkpoint)
        Conversion(folder, Recoding(folder, to, recipe_for(to, None, None))).run(out)
        folders.append({p.name: p.read_bytes() for p in sorted(out.iterdir())})
    assert folders[0] == folders[1]
