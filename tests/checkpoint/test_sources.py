"""Checkpoints by reference: a path, or a hub's repository, served here by a small hub of ours."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub import hub
from layouts import make_plan
from modelscope_hub import modelscope_hub, write_package
from typer.testing import CliRunner

from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.checkpoint.sources import FIRST_BYTES, configuration, headers, pinned, whole
from v4_ascend.checkpoint.sparse import write_sparse
from v4_ascend.checkpoint.synthetic import write_synthetic
from v4_ascend.cli.app import app
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_synthetic(ModelConfig.read(preset_path("tiny")), folder, seed=0)
    return folder


@pytest.fixture
def served(tiny, monkeypatch, tmp_path):
    """A hub with the tiny model, and an empty cache."""
    with hub({"org/tiny": {"main": tiny}}) as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server


def use(server, cache, monkeypatch):
    """Set what HF_ENDPOINT and HF_HUB_CACHE set, which are read once, at import."""
    constants = huggingface_hub.constants
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def ignore(done, total):
    """Take no note of progress."""


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_a_path_is_itself(tmp_path):
    assert whole("models/v4") == Path("models/v4")
    assert pinned("models/v4") == "models/v4"
    with headers(str(tmp_path), ignore) as folder:
        assert folder == tmp_path


@pytest.mark.parametrize(
    "repo", ["", "two words", "a/b/c", "org", "org/", "/name", "org/..", "org/name@", "org/na me"]
)
@pytest.mark.parametrize("scheme", ["hf", "modelscope"])
def test_what_is_no_repository_is_refused_with_the_form(scheme, repo):
    with pytest.raises(ConfigError, match=f"must be {scheme}:org/name or {scheme}:org/name@rev"):
        whole(f"{scheme}:{repo}")


def test_offline_a_repository_that_is_not_cached_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="^hf:org/name@v1: cannot be fetched: Cannot find"):
        whole("hf:org/name@v1")


def test_modelscope_without_its_package_says_what_is_missing():
    with pytest.raises(ConfigError, match="needs the package modelscope, which is not installed"):
        whole("modelscope:org/name")


@pytest.fixture
def modelscope(tiny, monkeypatch, tmp_path):
    """A hub of theirs with the tiny model, and a package of their name (see modelscope_hub.py)."""
    write_package(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    with modelscope_hub({("org/tiny", "master"): tiny, ("org/tiny", "v1"): tiny}) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        yield server
    for name in [n for n in sys.modules if n.partition(".")[0] == "modelscope"]:
        del sys.modules[name]


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_modelscope_brings_headers_for_a_look_and_files_for_work(
    modelscope, tiny, tmp_path, revision
):
    reference = f"modelscope:org/tiny{revision}"
    here, there = run("inspect", tiny, "--json"), run("inspect", reference, "--json")
    assert here.exit_code == there.exit_code == 0, there.output
    assert json.loads(there.stdout) == json.loads(here.stdout)
    sizes = {f.name: f.stat().st_size for f in tiny.iterdir()}
    parts = {name: n for name, n in modelscope.sent.items() if n < sizes[name]}
    assert parts == {name: FIRST_BYTES for name in sizes if sizes[name] > FIRST_BYTES}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    folder = whole(reference)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        f.name: f.read_bytes() for f in tiny.iterdir()
    }
    assert configuration(reference) == folder


def test_modelscope_names_what_the_hub_does_not_have_in_one_line(modelscope):
    with pytest.raises(CheckpointError, match="^modelscope:org/tiny@v9: cannot be fetched: .*404"):
        whole("modelscope:org/tiny@v9")


def test_what_is_fetched_is_what_the_hub_has_and_is_fetched_once(served, tiny, monkeypatch):
    folder = whole("hf:org/tiny")
    for file in tiny.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    sent = dict(served.sent)
    assert whole("hf:org/tiny") == folder
    assert {k: v for k, v in served.sent.items() if k} == {k: v for k, v in sent.items() if k}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert whole("hf:org/tiny") == folder
    served.asked.clear()
    assert run("inspect", "hf:org/tiny").exit_code == 0
    assert served.asked == []


def test_a_line_that_breaks_goes_on_where_it_broke(served, tiny, monkeypatch):
    piece = 1 << 14  # what the library keeps of a broken answer: whole pieces
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", piece)
    name = max(tiny.glob("*.safetensors"), key=lambda f: f.stat().st_size).name
    size = (tiny / name).stat().st_size
    served.cut_after[name] = size // 2
    assert (whole("hf:org/tiny") / name).read_bytes() == (tiny / name).read_bytes()
    assert size <= served.sent[name] < size + piece


def test_inspect_fetches_headers_alone(monkeypatch, tmp_path):
    flash, bare = tmp_path / "flash", tmp_path / "bare"
    write_sparse(ModelConfig.read(preset_path("flash")), flash)
    bare.mkdir()
    with hub({"deepseek/flash": {"main": flash}}) as server:
        use(server, bare, monkeypatch)
        here, there = run("inspect", flash, "--json"), run("inspect", "hf:deepseek/flash", "--json")
    assert here.exit_code == there.exit_code == 0
    assert json.loads(here.stdout) == json.loads(there.stdout)
    assert json.loads(there.stdout)["data"]["bytes"] == 159_609_485_896
    assert sum(server.sent.values()) < 40e6


def test_the_folder_of_headers_is_gone_when_they_were_read(served):
    with headers("hf:org/tiny", ignore) as folder:
        assert not CheckpointFolder(folder).check().problems
    assert not folder.exists()


def test_a_hub_that_gives_whole_files_only_is_left_at_once(served):
    served.gives_parts = False
    done = run("inspect", "hf:org/tiny")
    assert done.exit_code == 1
    assert "asked for a part, the hub answers 200 OK; fetch the checkpoint" in str(done.exception)


@pytest.mark.parametrize(
    ("reference", "why"),
    [("hf:org/none", "Repository Not Found"), ("hf:org/tiny@v9", "Revision Not Found")],
)
def test_what_the_hub_does_not_have_is_named_in_one_line(served, reference, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        whole(reference)
    assert "\n" not in str(caught.value)


def test_planning_fetches_the_configuration_alone(served):
    done = run("fit", "--model", "hf:org/tiny", "--device", "nvidia-h200", "--devices", 1,
               "--context", 1024, "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    planned = run("plan", "--topology", "laptop", "--model", "hf:org/tiny@main", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["data"]["model"]["source"] == "hf:org/tiny@main"
    assert {name for name in served.sent if name} == {"config.json"}


def test_a_branch_that_moves_does_not_move_what_is_pinned(served, tiny, tmp_path):
    reference = pinned("hf:org/tiny@main")
    was = whole(reference)
    assert reference == f"hf:org/tiny@{was.name}"
    moved = shutil.copytree(tiny, tmp_path / "moved")
    (moved / "generation_config.json").write_text("{}")
    served.repos["org/tiny"] = {"main": moved, "old": tiny}
    assert whole(reference) == was


def test_shard_looks_at_headers_first_and_fetches_what_can_be_laid_out(served, tiny, tmp_path):
    """A plan of another model costs no download, a dry run neither."""
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    good = make_plan(tiny, {"dp_size": 2, "ep_size": 2})
    first, second = good.ranks
    bad = good.model_copy(update={"ranks": (first, second.model_copy(update={"layers": (0, 43)}))})
    for written, dry in ((bad, ()), (good, ("--dry-run",))):
        written.write(plan)
        done = run("shard", "hf:org/tiny", "--plan", plan, "--out", out, *dry)
        assert done.exit_code == (0 if dry else 1), done.output
        whole_files = [
            a for a in served.asked if a[0] == "GET" and "safetensors" in a[1] and not a[2]
        ]
        assert [a[1] for a in whole_files if not a[1].endswith(".index.json")] == []
    assert not out.exists()
    good.write(plan)
    assert run("shard", "hf:org/tiny", "--plan", plan, "--out", out).exit_code == 0
    Sharding(CheckpointFolder(tiny), good).run(tmp_path / "local")
    for file in (tmp_path / "local").glob("rank-*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    said = json.loads((out / "manifest.json").read_text())["source"]
    assert said["revision"] == whole("hf:org/tiny").name
