"""Every command that the documentation shows exists, with the options it shows."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from v4_ascend.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands():
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.splitlines():
                if (found := re.search(r"\bv4-ascend .*", line)) and " ..." not in line:
                    yield pytest.param(found.group(), id=f"{page.name}: {found.group()[:60]}")


@pytest.mark.parametrize("line", list(_commands()))
def test_a_command_shown_can_be_parsed(line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    context = click.Context(command)
    command.make_parser(context).parse_args(words)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ["docs/emulation.md", "docs/ascend.md", "README.md"])
def test_nothing_that_is_only_emulated_is_called_supported(name):
    text = (
        (ROOT / name).read_text().replace("Nothing that is only emulated is called supported.", "")
    )
    assert re.findall(r"(?i)\bsupport(?:s|ed)\b", text) == []
