"""docs/cli.md is what the app says of itself; run this file to renew it."""

from pathlib import Path

import typer.main

from v4_ascend.cli.app import app

DOC = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# Every command and option

Generated from the app itself. `v4-ascend COMMAND -h` prints the same. What a command reports goes
to stdout, what it says meanwhile to stderr; with `--json` stdout is one object, `{"version": 1,
"status", "data", "diagnostics"}`.

| exit code | means |
|---|---|
| 0 | done |
| 1 | the work failed: a damaged checkpoint, an answer that is not what it must be |
| 2 | the request was wrong: a file, an option, a value |
| 3 | it does not fit, or no layout is legal |
| 4 | a preflight blocker, such as a port in use |
| 5 | parity or equivalence failed |
| 6 | a deployment failed |
| 7 | not in time |

`v4-ascend --install-completion` adds completion of commands and options to your shell.
"""


def commands(command, path):
    """Yield every command that does something, with the words that name it."""
    for name, sub in sorted(getattr(command, "commands", {}).items()):
        if getattr(sub, "commands", None) is None or sub.invoke_without_command:
            yield (*path, name), sub
        yield from commands(sub, (*path, name))


def cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def section(path, command):
    """One command as a heading, a usage line, what it does, and tables."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    shown = [a.name.upper() if a.required else f"[{a.name.upper()}]" for a in arguments]
    required = [f"{o.opts[0]} {o.name.upper()}" for o in options if o.required]
    usage = " ".join(["v4-ascend", *path, *shown, *required, "[options]" if options else ""])
    lines = [f"## {' '.join(path)}", "", f"`{usage.strip()}`", "", command.help or "", ""]
    rows = [(f"`{a}`", "", p.help or "") for a, p in zip(shown, arguments, strict=True)]
    for o in options:
        if o.name == "help":
            continue
        names = ", ".join(f"`{n}`" for n in (*o.opts, *o.secondary_opts))
        default = "" if o.is_flag or o.default in (None, ()) or callable(o.default) else o.default
        default = getattr(default, "value", default)
        rows.append((names, "required" if o.required else str(default), o.help or ""))
    if rows:
        lines += ["| | default | |", "|---|---|---|"]
        lines += [f"| {' | '.join(map(cell, row))} |" for row in rows] + [""]
    return "\n".join(lines)


def page():
    root = typer.main.get_command(app)
    return "\n".join([HEAD, *(section(*found) for found in commands(root, ()))])


def test_the_page_is_what_the_app_says():
    assert DOC.read_text(encoding="utf-8") == page()


def test_every_command_and_option_says_what_it_is_for():
    for path, command in commands(typer.main.get_command(app), ()):
        assert command.help, path
        for parameter in command.params:
            if parameter.name != "help":
                assert parameter.help, (path, parameter.name)


if __name__ == "__main__":
    DOC.write_text(page(), encoding="utf-8")
