"""The package list in pyproject.toml is what is on disk."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_folder_is_packaged():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = set()
    for package, folder in tool["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            tail = init.parent.relative_to(ROOT / folder).parts
            if package == "v4_ascend" and tail and f"v4_ascend.{tail[0]}" in tool["package-dir"]:
                continue  # reached through a link
            on_disk.add(".".join((package, *tail)))
    assert set(tool["packages"]) == on_disk


@pytest.mark.parametrize("name", ["ops", "backends", "supernode", "configs"])
def test_links_lead_to_the_root_folders(name):
    assert (ROOT / "v4_ascend" / name).resolve() == ROOT / name


@pytest.mark.parametrize("name", ["ops", "backends", "supernode", "configs"])
def test_only_one_import_name(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"import v4_ascend.{name}, not {name}"):
        __import__(name)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    """Built, unpacked elsewhere, and used from there without the repository."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    copy = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path / "site")
    assert {n.split("/")[0] for n in names} == {"v4_ascend", "v4_ascend-0.1.0.dist-info"}
    aclnn = "backends/mindspore/aclnn"
    listed = ("py.typed", "configs/topology/laptop.yaml", "runtime/verify_report.html")
    listed += ("runtime/api/page.html",)
    for data in (*listed, f"{aclnn}/v4_ops.cc", f"{aclnn}/interface.txt"):
        assert f"v4_ascend/{data}" in names
    # No editable install may help: it is found through the path alone.
    code = "import v4_ascend.ops, v4_ascend.cli; print(v4_ascend.ops.__file__)"
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "site"))
    command = [sys.executable, "-m", "v4_ascend", "ops", "--backend", "cpu"]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "sparse_attn" in done.stdout
