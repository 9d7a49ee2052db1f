"""The lock: what pyproject allows, what is installed here, and nothing without a hash."""

import re
import tomllib
from importlib.metadata import distributions
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "locks" / "cpu.txt").read_text()
PINS = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", TEXT, re.MULTILINE))
OURS = {"v4-ascend", "torch", "pip"}  # ours, the machine's, and what installs


def script(name):
    spec = spec_from_file_location(name, ROOT / "locks" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


beside, lock = script("beside"), script("lock")


def test_every_line_is_a_pin_with_hashes():
    body = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)
    entry = r"[a-z0-9-]+==[^\s\\]+(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert re.fullmatch(f"(?:{entry})+", body)
    assert list(PINS) == sorted(PINS)
    assert "://" not in TEXT
    assert "torch" not in PINS


@pytest.mark.parametrize("line", lock.wanted())
def test_the_lock_is_within_what_is_asked_for(line):
    asked = Requirement(line)
    assert asked.specifier.contains(PINS[beside.normal(asked.name)], prereleases=True)


def test_what_is_asked_for_is_all_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {Requirement(r).name for r in lock.wanted()}
    of_us = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {Requirement(r).name for r in of_us} - {"torch"} <= asked


def test_what_is_installed_is_what_is_locked():
    here = {beside.normal(d.metadata["Name"]): d.version for d in distributions()}
    assert {n: v for n, v in here.items() if n not in OURS} == PINS
    torch = re.search(r"install -q torch==(\S+)", (ROOT / "Makefile").read_text())[1]
    assert here["torch"].partition("+")[0] == torch


def test_beside_an_image_its_packages_stay():
    installed = {"torch": "2.10.0+cpu", "torch_npu": "2.10.0.post4", "PyYAML": "6.0.1", "vllm": "1"}
    assert beside.constraints("a-b==1 \\\n    --hash=sha256:0\npyyaml==6.0.4\n", installed) == [
        "a-b==1",
        "pyyaml==6.0.1",
        "torch==2.10.0+cpu",
    ]
