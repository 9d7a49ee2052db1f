"""docs/planning.md shows what its commands print; run this file to renew it."""

import re
import subprocess
import sys
from pathlib import Path

DOC = Path(__file__).parents[1] / "docs" / "planning.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def output(command):
    program, *rest = command.split()
    assert program == "v4-ascend"
    done = subprocess.run(
        [sys.executable, "-m", "v4_ascend", *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout


def renewed(text):
    def block(match):
        commands = [line for line in match[1].splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{c}\n{output(c[2:])}" for c in commands) + "```"

    return BLOCK.sub(block, text)


def test_the_page_shows_what_its_commands_print():
    text = DOC.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) >= 6
    assert renewed(text) == text


if __name__ == "__main__":
    DOC.write_text(renewed(DOC.read_text(encoding="utf-8")), encoding="utf-8")
