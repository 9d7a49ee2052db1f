"""Our images: the versions of the matrix, the rules of hadolint, and every RUN line carried out."""

import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from dockerfiles import Instruction, instructions, parse, problems
from stand_in_root import MISSING, NOTES, REASON, StandIn, context, is_possible, is_sent

from v4_ascend import __version__
from v4_ascend.deploy.doctor.matrix import matrix

ROOT = Path(__file__).parent.parent
NAMES = ("ascend", "cuda")
LOCK = (ROOT / "locks" / "cpu.txt").read_text()
# A base for buildah that has what pip must not touch: torch, by its name alone.
STAND_IN = """\
FROM docker.io/library/python:3.12-slim-bookworm
RUN mkdir /usr/local/lib/python3.12/site-packages/torch-2.13.0.dist-info \\
    && printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 2.13.0\\n' \\
       > /usr/local/lib/python3.12/site-packages/torch-2.13.0.dist-info/METADATA
"""
GOOD = """\
FROM a:1 AS b
RUN x
FROM b
USER v4
"""


def text(name):
    return (ROOT / f"Dockerfile.{name}").read_text()


def test_lines_are_joined_and_comments_between_them_dropped():
    found = list(
        instructions("# c\nRUN a \\\n  # why\n  && b\n\n# hadolint ignore=DL1,DL2\nUSER x\n")
    )
    assert found == [
        Instruction("RUN", "a && b", 2),
        Instruction("USER", "x", 7, frozenset({"DL1", "DL2"})),
    ]
    with pytest.raises(AssertionError, match="line 1: RUN does not end"):
        list(instructions("RUN a \\\n"))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("FROM ubuntu", "DL3006"),
        ("FROM ${X}", "DL3006"),
        ("FROM host:5000/ubuntu", "DL3006"),
        ("FROM ubuntu:latest", "DL3007"),
        ("RUN sudo x", "DL3004"),
        ("RUN a && cd b", "DL3003"),
        ("WORKDIR b", "DL3000"),
        ("ADD a b", "DL3020"),
        ("MAINTAINER me", "DL1000"),
        ("CMD a b", "DL3025"),
        ("ENTRYPOINT a", "DL3025"),
        ("HEALTHCHECK CMD curl x", "DL3025"),
        ("RUN a | b", "DL4006"),
        ("RUN apt install x", "DL3027"),
        ("RUN useradd v4", "DL3046"),
        ("RUN pip install --no-cache-dir x", "DL3013"),
        ("RUN python3 -m pip install -r x", "DL3042"),
        ("RUN X=1 python3 -m pip wheel .", "DL3042"),
        (
            "RUN apt-get install -y --no-install-recommends x=1",
            "DL3009",
        ),
        (
            "RUN apt-get install -y --no-install-recommends x && rm -rf /var/lib/apt/lists/*",
            "DL3008",
        ),
        (
            "RUN apt-get install --no-install-recommends x=1 && rm -rf /var/lib/apt/lists/*",
            "DL3014",
        ),
        ("RUN apt-get install -y x=1 && rm -rf /var/lib/apt/lists/*", "DL3015"),
    ],
)
def test_a_broken_rule_is_seen_and_a_comment_sets_it_aside(line, rule):
    assert problems(GOOD) == []
    broken = f"FROM a:1\n{line}\nUSER v4\n"
    assert problems(broken) == [f"2: {rule}"]
    assert problems(broken.replace(line, f"# hadolint ignore={rule}\n{line}")) == []


@pytest.mark.parametrize("user", ["", "USER root\n", "USER 0:0\n", "USER v4\nUSER root\n"])
def test_root_at_the_end_is_seen(user):
    (found,) = problems(f"FROM a:1\n{user}")
    assert found.endswith("DL3002")


@pytest.mark.parametrize("name", NAMES)
def test_ours_keep_the_rules(name):
    assert problems(text(name)) == []
    # What is set aside has its reason in a comment right before.
    aside = {r for i in instructions(text(name)) for r in i.ignored}
    assert aside <= {"DL3006", "DL3008"}


@pytest.mark.parametrize("name", NAMES)
def test_hadolint_itself_has_nothing_to_say(name):
    if not shutil.which("hadolint"):
        pytest.skip("no hadolint in PATH: its rules are in tests/dockerfiles.py")
    done = subprocess.run(
        ["hadolint", str(ROOT / f"Dockerfile.{name}")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_matrix_rules():
    images = matrix().images
    ascend, cuda = parse(text("ascend")), parse(text("cuda"))
    of_ascend = f"{images.ascend.repository}:{images.ascend.version}"
    assert set(images.ascend.suffixes) == {"a2", "a3", "950"}
    for soc, suffix in images.ascend.suffixes.items():
        assert ascend.chosen(SOC=soc) == of_ascend + suffix
    assert ascend.chosen() == ascend.chosen(SOC="950")
    assert ascend.chosen(BASE="mine:1") == "mine:1"
    assert cuda.chosen() == f"{images.cuda.repository}:{images.cuda.version}"
    assert cuda.chosen(BASE="mine:1") == "mine:1"
    newest = matrix().stacks[0]
    assert images.ascend.version == f"v{newest.vllm_ascend}"
    assert f"CANN {newest.cann}" in text("ascend")


@pytest.mark.parametrize("name", NAMES)
def test_what_an_image_is(name):
    final = parse(text(name)).stages[-1]
    (entry,), (command,), (health,) = (final.of(op) for op in ("ENTRYPOINT", "CMD", "HEALTHCHECK"))
    assert (entry.words, command.words) == (["v4-ascend"], ["--help"])
    module = re.search(r'CMD \["python3", "-m", "([\w.]+)"\]', health.rest)[1]
    assert importlib.util.find_spec(module) is not None
    (label,) = final.of("LABEL")
    assert set(re.findall(r"org\.opencontainers\.image\.(\w+)=", label.rest)) == {
        "title", "description", "version", "licenses"
    }  # fmt: skip
    assert f"ARG VERSION={__version__}" in text(name)
    assert not final.of("COPY"), "the final stage has no source"
    assert not any(re.search(r"gcc|g\+\+|apt-get", run.rest) for run in final.of("RUN"))


def test_only_what_the_wheel_is_made_of_is_sent():
    sent = ["v4_ascend/cli/app.py", "v4_ascend/ops", "ops/op.py", "configs/models/tiny.json",
            "pyproject.toml", "README.md", "LICENSE", "locks/cpu.txt",
            "backends/cpu/compiled/csrc/gemv.cpp"]  # fmt: skip
    kept = [".git/config", ".venv/bin/python", "tests/conftest.py", "docs/cli.md", "Makefile",
            "ops/__pycache__/op.cpython-311.pyc", "backends/cpu/compiled/_kernels.so",
            "id_rsa", ".env"]  # fmt: skip
    assert [n for n in sent + kept if is_sent(n)] == sent
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert all(is_sent(f"{folder}/x") for folder in tool["package-dir"].values())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both images, built on the stand-in; name to (builder, image)."""
    folder = tmp_path_factory.mktemp("images")
    if not is_possible(folder / "probe"):
        pytest.skip(REASON)
    sent, found = context(folder / "context"), {}
    for name in NAMES:
        dockerfile = parse(text(name))
        *_, first, last = dockerfile.stages
        builder, image = (StandIn(folder / name / part) for part in ("builder", "image"))
        builder.prepare()
        builder.build(first, dockerfile.args, sent, {})
        image.prepare()
        image.build(last, dockerfile.args, sent, {"builder": builder})
        found[name] = builder, image
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_run_line_is_carried_out_and_leaves_what_it_should(built, name):
    builder, image = built[name]
    (wheel,) = (builder.upper / "wheels").glob("*.whl")
    assert re.fullmatch(rf"v4_ascend-{__version__}-cp3\d+-cp3\d+-linux_\w+\.whl", wheel.name)
    here = {w.name for w in image.upper.iterdir()}
    assert "src" not in here
    assert not list((image.upper / "wheels").glob("*"))
    assert not list((image.upper / "tmp").glob("constraints*"))
    site = next(image.upper.rglob("v4_ascend/__init__.py")).parent
    assert next(site.glob("backends/cpu/compiled/_kernels*.so"), None) is not None
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", LOCK, re.MULTILINE))
    for package in MISSING:
        assert (site.parent / f"{package}-{pins[package]}.dist-info").is_dir()
    assert not list(image.upper.rglob("torch-*.dist-info")), "the base's torch was touched"
    notes = builder.upper / NOTES.lstrip("/")
    if name == "cuda":
        assert "install --yes --no-install-recommends g++ python3-dev" in notes.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_image_starts_as_its_user_and_works(built, name):
    _, image = built[name]
    final = parse(text(name)).stages[-1]
    user = final.of("USER")[-1].rest
    entry = final.of("ENTRYPOINT")[0].words
    health = re.search(r"CMD (\[.*\])", final.of("HEALTHCHECK")[0].rest)[1]
    who = image.run(["id", "-un"], user=user)
    assert who.stdout.strip() == user
    if user == "HwHiAiUser":
        assert image.run(["id", "-u"], user=user).stdout.strip() == "1000"
    for words, says in (
        ([*entry, *final.of("CMD")[0].words], "Usage: v4-ascend"),
        ([*entry, "plan", "--topology", "supernode"], "v4-pro"),
        ([*entry, "ops", "--backend", "cpu"], "sparse_attn"),
        ([*entry, "init", "--preset", "tiny", "--out", "tiny"], ""),
        ([*entry, "inspect", "tiny"], "DeepSeek-V4"),
        (Instruction("CMD", health, 0).words, ""),
    ):
        done = image.run(words, user=user)
        assert done.returncode == 0, f"{words}: {done.stderr[-800:]}"
        assert says in done.stdout
    found = json.loads(image.run([*entry, "doctor", "--json"], user=user).stdout)["data"]
    assert "software.python" in {f["check"] for f in found["findings"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_buildah_builds_them(name, tmp_path):
    if not shutil.which("buildah"):
        pytest.skip("no buildah in PATH: RUN lines are executed in a copy-on-write root")

    def buildah(*words):
        command = ["buildah", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    (tmp_path / "Dockerfile").write_text(STAND_IN)
    buildah("build", "--tag", "localhost/v4-ascend-base", tmp_path)
    buildah("build", "--build-arg", "BASE=localhost/v4-ascend-base", "--tag",
            f"localhost/v4-ascend-{name}", "--file", ROOT / f"Dockerfile.{name}", ROOT)  # fmt: skip
    container = buildah("from", f"localhost/v4-ascend-{name}")
    try:
        assert "Usage: v4-ascend" in buildah("run", container, "--", "v4-ascend", "--help")
    finally:
        buildah("rm", container)
