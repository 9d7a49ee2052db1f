"""inspect --verify and --diff: damage is found, and named by tensor."""

import json
import re
import shutil
import struct
import subprocess
import sys

import pytest
from layouts import LAYOUTS, make_plan, write_tiny

from v4_ascend.checkpoint.convert import Conversion
from v4_ascend.checkpoint.damage import checkpoint_damage
from v4_ascend.checkpoint.difference import differences
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.manifest import read_record
from v4_ascend.checkpoint.reader import Checkpoint, RankCheckpoint
from v4_ascend.checkpoint.recoding import Recoding
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.checkpoint.sharded import ShardedFolder
from v4_ascend.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("verify") / "checkpoint")


@pytest.fixture(scope="module")
def pristine(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "out"
    Sharding(CheckpointFolder(checkpoint), make_plan(checkpoint, LAYOUTS["tp2"])).run(out)
    return out


@pytest.fixture
def sharded(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "sharded")


def nothing(n):
    pass


def damage(folder):
    return list(ShardedFolder(folder).damage(nothing))


def flip(file, at, bit=0):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1 << bit
    file.write_bytes(raw)


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "v4_ascend", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_is_found_where_nothing_is_wrong(pristine, checkpoint):
    assert damage(pristine) == []
    assert (
        list(checkpoint_damage(list(CheckpointFolder(checkpoint).headers.values()), nothing)) == []
    )


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_found_and_its_tensor_named(sharded, where, bit):
    file = sharded / "rank-00001.safetensors"
    tensors = [t for t in read_record(file).tensors if t.end > t.begin]
    tensor = tensors[round(where * (len(tensors) - 1))]
    flip(file, tensor.begin + round(where * (tensor.end - tensor.begin - 1)), bit)
    found = damage(sharded)
    assert any(p.startswith(f"rank-00001.safetensors: {tensor.name}: bytes ") for p in found)
    assert all(tensor.name in p for p in found)


def test_a_flipped_bit_of_the_header_is_found(sharded):
    flip(sharded / "rank-00000.safetensors", 40)
    assert damage(sharded) == ["rank-00000.safetensors: its header is not the recorded one"]


@pytest.mark.parametrize(
    ("hurt", "says"),
    [
        (lambda f: flip(f / "rank-00001.record.json", 30), "record.json: is not the one that"),
        (lambda f: flip(f / "config.json", 3), "config.json: has the SHA-256"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: cannot be read: No such"),
        (
            lambda f: (f / "rank-00001.safetensors").unlink(),
            "rank-00001.*: cannot be read: No such",
        ),
    ],
    ids=["record", "config", "tokenizer", "file"],
)
def test_other_damage_is_found_too(sharded, hurt, says):
    folder = ShardedFolder(sharded)
    hurt(sharded)
    found = list(folder.damage(nothing))
    assert len(found) == 1
    assert re.search(says, found[0])


def test_a_truncated_file_is_never_taken_for_whole(sharded, checkpoint):
    file = sharded / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert any("bytes, manifest.json says" in p for p in damage(sharded))
    with pytest.raises(CheckpointError, match=r"rank-00001.*bytes, manifest\.json says"):
        ShardedFolder(sharded).rank_headers(make_plan(checkpoint, LAYOUTS["tp2"]), 1)


def test_a_rank_does_not_load_what_was_flipped(sharded, checkpoint):
    plan = make_plan(checkpoint, LAYOUTS["tp2"])
    tensor = read_record(sharded / "rank-00001.safetensors").tensors[-2]
    flip(sharded / "rank-00001.safetensors", tensor.begin)
    rank = RankCheckpoint(ShardedFolder(sharded), plan, 1)
    with pytest.raises(CheckpointError, match=rf"{tensor.name}: bytes .* have the CRC-32 .*resume"):
        rank.tensor(tensor.name)
    others = [name for name in rank.headers if name != tensor.name]
    assert all(rank.tensor(name) is not None for name in others)


def test_a_converted_tensor_is_not_read_if_it_was_flipped(tmp_path, checkpoint):
    folder = CheckpointFolder(checkpoint)
    Conversion(folder, Recoding(folder, "fp8", None)).run(tmp_path / "fp8")
    name = "layers.2.ffn.experts.3.w1.weight"
    assert Checkpoint(tmp_path / "fp8").tensor(name) is not None
    header = CheckpointFolder(tmp_path / "fp8").headers[name]
    flip(header.file, header.end - 1)
    with pytest.raises(CheckpointError, match=rf"{name}: bytes .* have the CRC-32"):
        Checkpoint(tmp_path / "fp8").tensor(name)
    header.file.write_bytes(header.file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is truncated"):
        Checkpoint(tmp_path / "fp8")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("layers.1.attn.wq_a.scale", b"\xff", "1 values are no scales"),
        ("layers.1.attn.wq_a.weight", b"\x7f\xff", "2 values are not finite"),
        ("layers.1.attn_norm.weight", struct.pack("<H", 0x7F80), "1 values are not finite"),
        ("layers.1.attn.attn_sink", struct.pack("<f", float("nan")), "1 values are not finite"),
        ("layers.1.ffn.gate.tid2eid", struct.pack("<q", -1), "1 values are negative"),
    ],
    ids=["e8m0", "e4m3", "bf16", "f32", "i64"],
)
def test_what_is_no_number_is_found_in_a_checkpoint(tmp_path, checkpoint, name, value, says):
    folder = shutil.copytree(checkpoint, tmp_path / "c")
    header = CheckpointFolder(folder).headers[name]
    with header.file.open("r+b") as f:
        f.seek(header.begin)
        f.write(value)
    done = run("inspect", folder, "--verify", "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["status"]) == (1, "error")
    (problem,) = said["diagnostics"]
    assert problem.startswith(f"{header.file.name}: {name}: {says}")


def test_the_command_names_the_tensor_and_exits_with_1(sharded):
    fine = run("inspect", sharded, "--verify")
    assert (fine.returncode, "every checksum is the recorded one" in fine.stdout) == (0, True)
    flip(sharded / "rank-00000.safetensors", -1)
    done = run("inspect", sharded, "--verify")
    assert done.returncode == 1
    last = read_record(sharded / "rank-00000.safetensors").tensors[-1].name
    assert f"rank-00000.safetensors: {last}: bytes" in done.stdout
    assert run("inspect", sharded).returncode == 0  # headers alone do not show it


def test_a_command_for_checkpoints_says_what_a_sharded_folder_is(sharded):
    done = run("inspect", sharded, "--diff", sharded)
    assert done.returncode == 1
    assert "was made for one plan" in done.stderr


def test_differences_are_named_by_tensor(tmp_path, checkpoint):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    header = CheckpointFolder(other).headers["layers.2.attn.wkv.weight"]
    flip(header.file, header.begin + 100)
    found = list(differences(CheckpointFolder(checkpoint), CheckpointFolder(other), nothing))
    assert found == [
        f"layers.2.attn.wkv.weight: bytes differ from byte 100 of {header.nbytes:,} on"
    ]
    assert run("inspect", checkpoint, "--diff", other).returncode == 1
    assert run("inspect", checkpoint, "--diff", checkpoint).returncode == 0
