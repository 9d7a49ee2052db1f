"""The three ways in of docs/start.md, run from its text: what it shows is what is printed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "docs/start.md").read_text(encoding="utf-8")
WAYS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)


def steps_of(text):
    """Yield each command of a way and what is to follow it; ``...`` stands for anything."""
    for block in re.findall(r"```console\n(.*?)```", text, re.S):
        for step in re.split(r"^\$ ", block, flags=re.M)[1:]:
            first, *rest = step.splitlines()
            n = next((i for i, line in enumerate(rest) if not line.startswith("> ")), len(rest))
            command = "\n".join([first, *(line[2:] for line in rest[:n])])
            yield command, "".join(f"{line}\n" for line in rest[n:])


def pattern_of(shown):
    lines = shown.splitlines(keepends=True)
    parts = [re.escape(line).replace(r"\.\.\.", ".*") for line in lines]
    return "".join(r"(?:.*\n)*?" if p == ".*\n" or p == ".*\\\n" else p for p in parts)


def printed(command, folder, env):
    """What a shell says, both streams as a terminal shows them."""
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            said = shell.communicate(timeout=180)[0]
            return said if said.endswith("\n") or not said else f"{said}\n"
        finally:
            if shell.returncode is None:
                os.killpg(shell.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), WAYS, ids=[name for name, _ in WAYS])
def test_a_way_in_leads_where_its_text_says(name, text, tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    env = os.environ | {"PATH": path, "COLUMNS": "160", "OMP_NUM_THREADS": "1"} | state
    env.pop("TRITON_INTERPRET", None)  # other tests have it set
    try:
        for command, shown in steps_of(text):
            told = printed(command, tmp_path, env)
            assert re.fullmatch(pattern_of(shown), told), f"$ {command}\n{told}"
    finally:
        printed("v4-ascend down mine", tmp_path, env)


def test_the_text_is_compared_with_what_is_printed():
    (step,) = steps_of("```console\n$ echo one; \\\n> echo two\none\n...\n```\n")
    assert step == ("echo one; \\\necho two", "one\n...\n")
    pattern = pattern_of("a ... c\n...\nend\n")
    assert re.fullmatch(pattern, "a b c\nx\ny\nend\n")
    assert re.fullmatch(pattern, "a b c\nend\n")
    for other in ("a b d\nend\n", "a b c\nend\nmore\n", "a b\nc\nend\n"):
        assert not re.fullmatch(pattern, other)


def test_each_of_the_three_has_a_way():
    assert len(WAYS) == 3
    assert all(len(list(steps_of(text))) >= 3 for _, text in WAYS)
