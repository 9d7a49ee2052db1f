"""A checkpoint from a stranger: nothing outside of its folder is read, and no code of it runs."""

import json
import os
import pickle
import shutil

import pytest

from v4_ascend.checkpoint.folder import INDEX, MANIFEST, CheckpointFolder
from v4_ascend.checkpoint.sharded import open_folder
from v4_ascend.checkpoint.synthetic import write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.errors import CheckpointError

TINY = ModelConfig.read(preset_path("tiny"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "tiny"
    write_synthetic(TINY, folder, seed=1)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "tiny")


def point(folder, name):
    """Let the index look for one tensor elsewhere."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "", ".",
     "x\0.safetensors", "\\\\host\\share\\x", "sub/model.safetensors"],
)  # fmt: skip
def test_an_index_names_files_beside_it_alone(folder, name):
    (folder.parent / "other.safetensors").write_bytes(b"secret")
    point(folder, name)
    with pytest.raises(CheckpointError, match="must be a .safetensors file beside it") as error:
        CheckpointFolder(folder)
    assert repr(name) in str(error.value)


def test_an_index_cannot_name_a_pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    point(folder, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"names 'pytorch_model\.bin'; it must be a .safet"):
        CheckpointFolder(folder)


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_of_pickles_is_refused_and_none_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    shutil.copy(preset_path("tiny"), tmp_path / "config.json")
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=f"{name} is a pickle, which is never read"):
        CheckpointFolder(tmp_path)
    assert not (tmp_path / "sprung").exists()
    # Under the name of a safetensors file it is none.
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="header"):
        CheckpointFolder(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["model-00001-of-00009.safetensors", "tokenizer.json", "notes.txt"]
)
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    """What is copied beside the weights, notes.txt, would be given away with them."""
    secret = tmp_path / "secret"
    secret.write_text("of the user's")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    with pytest.raises(CheckpointError, match="outside of the checkpoint") as error:
        open_folder(folder)
    assert str(secret) in str(error.value)


def test_links_within_a_folder_and_a_link_to_it_are_its_own(folder, tmp_path):
    (folder / "copy.json").symlink_to("config.json")
    (tmp_path / "latest").symlink_to("tiny")
    CheckpointFolder(tmp_path / "latest").require_complete()


def hub_cache(folder, cache):
    """Lay a folder out as huggingface_hub does: snapshots of links to blobs."""
    snapshot = cache / "models--org--tiny" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_links_of_a_hub_cache_lead_to_its_blobs_and_no_further(folder, tmp_path):
    snapshot = hub_cache(folder, tmp_path / "hub")
    CheckpointFolder(snapshot).require_complete()
    (tmp_path / "hub" / "token.json").write_text("secret")
    (snapshot / "token.json").symlink_to("../../../token.json")
    with pytest.raises(CheckpointError, match=r"token\.json, outside of the checkpoint"):
        CheckpointFolder(snapshot)


@pytest.mark.parametrize("where", ["files", "copied"])
def test_a_manifest_names_files_beside_it_alone(folder, where):
    (folder / INDEX).unlink()
    entry = {"name": "../x.safetensors", "rank": 0, "nbytes": 0, "digest": "", "record": ""}
    manifest = {
        "source": {"path": "/", "revision": None, "digest": "", "files": {}},
        "plan": "0",
        "layout": "0",
        "n_ranks": 1,
        "is_linked": False,
        "copied": {"../x.safetensors": "0"} if where == "copied" else {},
        "files": [entry] if where == "files" else [],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="'../x.safetensors' is not the name of a file besi"):
        open_folder(folder)


def test_a_pipe_in_place_of_a_file_does_not_make_us_wait(tmp_path):
    shutil.copy(preset_path("tiny"), tmp_path / "config.json")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"neither .* nor model.safetensors is there"):
        CheckpointFolder(tmp_path)
