"""Reading, checking and refusing checkpoints."""

import json
import shutil
import struct

import pytest
import torch
from safetensors import safe_open

from v4_ascend.checkpoint.folder import INDEX
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.errors import CheckpointError, ConfigError

TINY = ModelConfig.read(preset_path("tiny"))
SHARD = "model-00003-of-00009.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "tiny"
    write_synthetic(TINY, folder, seed=1)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "tiny")


def edit_header(file, change):
    raw = file.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    data = change(header, raw[8 + n :])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + (raw[8 + n :] if data is None else data))


@pytest.mark.parametrize("format", ["fp8", "bf16", "fp32"])
def test_every_format_is_complete_and_read_as_safetensors_reads_it(tmp_path, format):
    config = in_format(TINY, format)
    write_synthetic(config, tmp_path / "c", seed=1)
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.config == config
    assert checkpoint.check().problems == ()
    for name, tensor in checkpoint.stream():
        with safe_open(checkpoint.headers[name].file, framework="pt") as f:
            want = f.get_tensor(name)
        assert tensor.dtype == want.dtype
        assert torch.equal(tensor.view(torch.uint8), want.view(torch.uint8))


def test_trap_t41_scales_keep_their_bytes(pristine):
    checkpoint = Checkpoint(pristine)
    name = "layers.2.attn.wq_a.scale"
    scale = checkpoint.tensor(name)
    assert scale.dtype == torch.float8_e8m0fnu
    header = checkpoint.headers[name]
    raw = header.file.read_bytes()[header.begin : header.end]
    assert bytes(scale.view(torch.uint8).flatten().tolist()) == raw


def test_trap_t34_hash_tables_are_distinct_int64_expert_ids(pristine):
    table = Checkpoint(pristine).tensor("layers.0.ffn.gate.tid2eid")
    assert table.dtype == torch.int64
    assert all(len(set(row)) == len(row) for row in table.tolist())
    assert int(table.max()) < TINY.n_routed_experts


def test_values_depend_on_the_seed_and_the_name_alone(pristine, tmp_path):
    write_synthetic(TINY, tmp_path / "again", seed=1)
    write_synthetic(TINY, tmp_path / "other", seed=2)
    name = "layers.4.attn.wkv.weight"
    first, again, other = (
        Checkpoint(p).tensor(name).view(torch.uint8)
        for p in (pristine, tmp_path / "again", tmp_path / "other")
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_file_without_an_index_is_a_checkpoint_too(pristine, tmp_path):
    from safetensors.torch import save_file

    out = tmp_path / "single"
    out.mkdir()
    save_file(dict(Checkpoint(pristine).stream()), out / "model.safetensors")
    shutil.copy(pristine / "config.json", out)
    assert Checkpoint(out).check().problems == ()


def test_a_folder_with_something_in_it_is_not_overwritten(folder):
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_synthetic(TINY, folder, seed=2)
    assert sorted(p.name for p in folder.iterdir()) == before
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/tiny: cannot be written: File exists"):
        write_synthetic(TINY, tmp_path / "file" / "tiny", seed=0)


def test_a_checkpoint_larger_than_the_disk_is_refused_before_a_byte_is_written(tmp_path):
    huge = TINY.model_copy(update={"vocab_size": 10**12})
    with pytest.raises(ConfigError, match=r"needs [\d,]+ bytes, its disk has [\d,]+ free"):
        write_synthetic(huge, tmp_path / "huge", seed=0)
    assert not list(tmp_path.iterdir())


def truncated(folder):
    file = folder / SHARD
    file.write_bytes(file.read_bytes()[:-10])


def header_larger_than_the_file(folder):
    file = folder / SHARD
    file.write_bytes(struct.pack("<Q", 10**9) + file.read_bytes()[8:])


def header_is_not_json(folder):
    file = folder / SHARD
    raw = file.read_bytes()
    file.write_bytes(raw[:8] + b"x" + raw[9:])


def too_short(folder):
    (folder / SHARD).write_bytes(b"abc")


def offsets_overlap(folder):
    def change(header, data):
        first, second = sorted(
            (k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"]
        )[:2]
        size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
        begin = header[first]["data_offsets"][1] - 1
        header[second]["data_offsets"] = [begin, begin + size]

    edit_header(folder / SHARD, change)


def unknown_dtype(folder):
    def change(header, data):
        header["layers.1.attn.attn_sink"]["dtype"] = "F64"

    edit_header(folder / SHARD, change)


def shape_and_bytes_differ(folder):
    def change(header, data):
        header["layers.1.attn.attn_sink"]["shape"] = [5]

    edit_header(folder / SHARD, change)


def two_files_claim_one_tensor(folder):
    other = "model-00004-of-00009.safetensors"
    index = json.loads((folder / INDEX).read_text())
    shutil.copy(folder / SHARD, folder / "extra.safetensors")
    index["weight_map"] |= {"x": "extra.safetensors"}
    (folder / INDEX).write_text(json.dumps(index))
    assert (folder / other).exists()


def shard_is_gone(folder):
    (folder / SHARD).unlink()


def index_is_not_json(folder):
    (folder / INDEX).write_text("{")


def index_names_a_number(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": 3}}))


def index_names_a_file_elsewhere(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": "../x"}}))


def index_names_another_file(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["norm.weight"] = SHARD
    (folder / INDEX).write_text(json.dumps(index))


def nothing_there(folder):
    for file in folder.glob("model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, r"00003.*: is truncated: \d+ bytes, its header describes \d+"),
        (header_larger_than_the_file, r"header of 1000000000 bytes does not fit the file of \d+"),
        (header_is_not_json, "header is not valid"),
        (too_short, "3 bytes, too short"),
        (offsets_overlap, "overlaps the tensor before it"),
        (unknown_dtype, "attn_sink: dtype 'F64' is not one of BF16"),
        (shape_and_bytes_differ, r"F32 \[5\] takes 20 bytes, its offsets .* hold 16"),
        (two_files_claim_one_tensor, r"is in extra\.safetensors and in model-00003"),
        (shard_is_gone, "names files that are not there: model-00003"),
        (index_is_not_json, "is not a safetensors index"),
        (index_names_a_number, "weight_map names 3; it must be a .safetensors file beside it"),
        (index_names_a_file_elsewhere, "it must be a .safetensors file beside it"),
        (index_names_another_file, r"norm\.weight should be in model-00003.*, is in model-00008"),
        (nothing_there, "neither model.safetensors.index.json nor model.safetensors is there"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_damaged_checkpoint_is_refused_when_opened(folder, damage, says):
    damage(folder)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(folder)


def replace_tensor(folder, name, tensor):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / SHARD)
    if tensor is None:
        del tensors[name]
        index = json.loads((folder / INDEX).read_text())
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))
    else:
        tensors[name] = tensor
    save_file(tensors, folder / SHARD)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("layers.1.attn.attn_sink", None, "attn_sink is missing"),
        ("layers.1.attn.more", torch.ones(3), "layers.1.attn.more is not part of this model"),
        (
            "layers.1.attn.attn_sink",
            torch.ones(4, dtype=torch.bfloat16),
            r"attn_sink is BF16 \[4\], expected F32 \[4\]",
        ),
        ("layers.1.attn.attn_sink", torch.ones(5), r"attn_sink is F32 \[5\], expected F32 \[4\]"),
    ],
    ids=["missing", "unexpected", "dtype", "shape"],
)
def test_what_the_config_does_not_describe_is_listed(folder, name, tensor, says):
    replace_tensor(folder, name, tensor)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(folder).require_complete()


def test_an_index_with_another_total_is_a_problem(folder):
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the index says [\d,]+ bytes, the files hold"):
        Checkpoint(folder).require_complete()


def test_a_scale_that_is_not_a_number_is_refused_when_read(folder):
    name = "layers.1.attn.wq_a.scale"
    scale = Checkpoint(folder).tensor(name)
    scale.view(torch.uint8)[0, 0] = 255
    replace_tensor(folder, name, scale)
    with pytest.raises(CheckpointError, match=r"wq_a\.scale: 1 of 1 scales are not numbers"):
        Checkpoint(folder).tensor(name)
