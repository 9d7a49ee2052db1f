"""docs/backends.md, followed to the letter in a copy of the repository.

Its code goes into the files it names, its tables' lines where they say, its commands are run.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/backends.md").read_text()
COPIED = ("ops", "backends", "supernode", "configs", "v4_ascend", "tests", "docs")
STEPS = [s for s in re.split(r"^##+ ", PAGE, flags=re.M) if re.match(r"\d\. ", s)]
FILE = re.compile(r"^`(\S+)`:\n\n```python\n(.*?)^```$", re.M | re.S)
EDIT = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|$", re.M)
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository, its links kept."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def add(file, begins, line):
    lines = file.read_text().split("\n")
    (at,) = [i for i, text in enumerate(lines) if text.startswith(begins)]
    file.write_text("\n".join([*lines[: at + 1], line, *lines[at + 1 :]]))


@pytest.fixture(scope="module")
def run(copy):
    """Return a function that runs a command as a contributor does, in the copy."""
    env = os.environ | {"PYTHONPATH": str(copy), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, Path(__file__).with_name("contributor.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def ask(line):
        words = shlex.split(line)
        if words[0] == "pytest":
            words[1:1] = ["-q", "-p", "no:cacheprovider"]
        runner.stdin.write(json.dumps(words) + "\n")
        runner.stdin.flush()
        return json.loads(runner.stdout.readline())

    with subprocess.Popen(command, cwd=copy, env=env, **pipes) as runner:
        yield ask
    assert runner.returncode == 0


SAID = {
    "v4-ascend verify --backend cpu --op scale_rows": r"scale_rows.*[1-9]\d* passed, 0 failed",
    "v4-ascend ops --backend mirror": "scale_rows.*by_row",
    "v4-ascend verify --backend mirror": r"scale_rows.*[1-9]\d* passed, 0 failed",
}


def test_a_new_contributors_walk(copy, run):
    """An operator, a kernel of it, a backend: in this order, as the page has them."""
    assert len(STEPS) == 3
    for step in STEPS:
        files, edits, commands = FILE.findall(step), EDIT.findall(step), COMMANDS.findall(step)
        assert len(files) == 1
        assert edits
        assert len(commands) == 1
        for name, text in files:
            target = copy / name
            assert not target.exists()
            target.parent.mkdir(exist_ok=True)
            target.write_text(text)
        for name, begins, line in edits:
            add(copy / name, begins, line)
        for line in commands[0].splitlines():
            status, said = run(line)
            assert status == 0, f"{line}\n{said[-3000:]}"
            assert re.search(SAID.get(line, r"[1-9]\d* passed"), said, re.S), said
    wrong = copy / "backends/cpu/scale_rows.py"
    wrong.write_text(
        wrong.read_text().replace("torch.diag(scale) @ x", "torch.diag(scale) @ x + 1")
    )
    status, said = run("v4-ascend verify --backend cpu --op scale_rows")
    assert status == 5, "what the page builds is not what was verified"
    assert "by_diagonal" in said
