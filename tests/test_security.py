"""What no file of ours may do, found in their syntax; and SECURITY.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

from v4_ascend.deploy.ssh import SSH

ROOT = Path(__file__).parent.parent
ROOMS = ("v4_ascend", "ops", "backends", "supernode", "configs")
SOURCES = sorted({p.resolve() for room in ROOMS for p in (ROOT / room).rglob("*.py")})
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
          "asyncio.create_subprocess_shell", "pty.spawn"}  # fmt: skip
CODE = {"eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load",
        "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load",
        "pandas.read_pickle"}  # fmt: skip
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# These of torch.distributed pickle what they send, and unpickle what comes.
OBJECTS = {"all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list",
           "send_object_list", "recv_object_list"}  # fmt: skip
# The emulated NPU's check that all ranks ask for the same; its ranks are tests' own processes.
MAY_EXCHANGE_OBJECTS = {"v4_ascend/emulation/vendor/mc2_checks.py"}


def named(node):
    """Spell what is called: ``a.b.c``, or the last of it behind something computed."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}".lstrip(".")
    return ""


def offences(source):
    """Yield line and reason of each call or import that runs a shell, code or a pickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            )
            for module in modules:
                if module and module.partition(".")[0] in PICKLES:
                    yield node.lineno, f"imports {module}"
        if not isinstance(node, ast.Call):
            continue
        name = named(node.func)
        if name in SHELLS | CODE or name.rpartition(".")[2] in OBJECTS:
            yield node.lineno, f"calls {name}"
        shell = [k.value for k in node.keywords if k.arg == "shell"]
        if shell and not (isinstance(shell[0], ast.Constant) and shell[0].value is False):
            yield node.lineno, f"{name} with shell="
        is_process = name.startswith(("subprocess.", "os.exec", "os.spawn", "os.posix_spawn"))
        if is_process and node.args and isinstance(node.args[0], ast.JoinedStr | ast.BinOp):
            yield node.lineno, f"{name} of a string that is put together"


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(x, shell=True)", "subprocess.run(x, shell=y)", "os.system(x)",
        "subprocess.getoutput(x)", "eval(x)", "torch.load(f)", "torch.load(f, weights_only=True)",
        "yaml.load(f, Loader=yaml.Loader)", "import pickle", "from dill import loads",
        "np.load(f, allow_pickle=True)", "dist.all_gather_object(a, b)",
        "subprocess.run(f'ls {x}')", "subprocess.Popen('ls ' + x)",
    ],
)  # fmt: skip
def test_an_offence_is_seen(line):
    assert len(list(offences(line))) == 1


@pytest.mark.parametrize(
    "line", ["subprocess.run(['ls', x])", "subprocess.run(x, shell=False)", "model.eval()",
             "yaml.safe_load(f)", "re.compile(x)", "ast.literal_eval(x)", "import json"],
)  # fmt: skip
def test_what_is_none_is_not(line):
    assert list(offences(line)) == []


def test_no_source_runs_a_shell_or_code_or_reads_a_pickle():
    assert len(SOURCES) > 300
    found = [
        f"{path.relative_to(ROOT)}:{line}: {reason}"
        for path in SOURCES
        for line, reason in offences(path.read_text())
    ]
    assert [f for f in found if f.partition(":")[0] not in MAY_EXCHANGE_OBJECTS] == []
    assert {f.partition(":")[0] for f in found} == MAY_EXCHANGE_OBJECTS


def test_yaml_is_composed_and_never_constructed():
    """Tags of YAML could name Python objects; our reader takes nodes apart itself."""
    for path in SOURCES:
        loaders = re.findall(r"Loader=(?:yaml\.)?(\w+)", path.read_text())
        assert set(loaders) <= {"SafeLoader"}, path


def test_ssh_asks_nobody_and_trusts_no_new_host():
    words = " ".join(SSH)
    assert "BatchMode=yes" in words
    assert SSH[-1] == "--", "a host named -oProxyCommand=... would be an option"
    for page in (*SOURCES, *ROOT.glob("docs/*.md"), ROOT / "README.md"):
        text = page.read_text()
        assert not re.search(r"StrictHostKeyChecking[= ](no|off|accept-new)", text), page
        assert "UserKnownHostsFile" not in text, page


def _claims():
    for line in (ROOT / "SECURITY.md").read_text().splitlines():
        for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line):
            yield pytest.param(file, test, id=f"{file}::{test}")


def test_security_md_shows_a_test_for_each_line_of_what_is_defended():
    text = (ROOT / "SECURITY.md").read_text()
    defended = text.partition("## What is defended")[2].partition("\n## ")[0]
    rows = [line for line in defended.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 15
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::\w+`", row), row


@pytest.mark.parametrize(("file", "test"), list(_claims()))
def test_a_test_that_security_md_names_exists(file, test):
    tree = ast.parse((ROOT / file).read_text())
    assert test in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
