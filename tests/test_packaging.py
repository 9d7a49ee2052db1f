"""The package list in pyproject.toml is what is on disk."""

import sys
import tomllib
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
