import html
import json
import re
from typing import get_args
from xml.etree import ElementTree

import pytest
from planting import planted_kernel
from typer.testing import CliRunner

from v4_ascend.backends import Proof
from v4_ascend.cli.app import app
from v4_ascend.errors import ConfigError, ParityError
from v4_ascend.ops import OPS
from v4_ascend.runtime.verify import Result, Selection
from v4_ascend.runtime.verify_report import MARKS, facts, page


def _run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture
def wrong_swiglu():
    """A CPU kernel that forgets the clamp, and refuses to run without weights."""
    op = OPS["swiglu"]

    def unclamped(x, limit, weight):
        return op.reference(x, 1e9, weight)

    def why_not(x, limit, weight):
        return None if weight is not None else "needs weights"

    with planted_kernel(op, "cpu", unclamped, why_not):
        yield


def test_ops_lists_every_operator():
    data = json.loads(_run("ops", "--json").stdout)["data"]
    assert {row["backend"] for row in data} >= {"cpu"}
    for row in data:
        assert {c["op"] for c in row["ops"]} == set(OPS)
        for c in row["ops"]:
            assert c["missing"] or c["choices"], c["op"]


def test_ops_says_what_is_wrong_with_a_question():
    assert isinstance(_run("ops", "--soc", "950dt").exception, ConfigError)
    assert isinstance(_run("ops", "--backend", "tpu").exception, ConfigError)
    assert isinstance(_run("ops", "--backend", "cpu", "--soc", "950dt").exception, ConfigError)


def test_verify_passes_on_the_cpu_and_writes_reports(tmp_path):
    done = _run("verify", "--backend", "cpu", "--op", "hadamard", "--report", tmp_path / "r")
    assert done.exit_code == 0
    assert "12 passed, 0 failed, 4 refused" in done.stdout  # rows too short for the compiled one
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["counts"] == {"passed": 12, "refused": 4}
    assert {r["proof"] for r in report["results"] if r["outcome"] == "passed"} == {"executed"}
    suite = ElementTree.parse(tmp_path / "r" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("16", "0")
    page = (tmp_path / "r" / "index.html").read_text()
    assert "<script src" not in page
    assert "http" not in page
    assert sorted(f.name for f in (tmp_path / "r").iterdir()) == [
        "index.html",
        "junit.xml",
        "report.json",
    ]


def test_verify_fails_a_wrong_kernel(tmp_path, wrong_swiglu):
    args = ("verify", "--backend", "cpu", "--op", "swiglu", "--report", tmp_path)
    done = _run(*args)
    assert done.exit_code == 5
    assert "elements differ" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    failed = {(r["kernel"], r["outcome"]) for r in report["results"]}
    assert failed >= {("unclamped", "failed"), ("unclamped", "refused"), ("reference", "passed")}
    assert "needs weights" in (tmp_path / "index.html").read_text()
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().find(".//failure") is not None
    assert json.loads(_run(*args, "--json").stdout)["status"] == "error"


def test_verify_refuses_what_selects_nothing(tmp_path):
    for args, says in (
        (("--op", "ropes"), "no operator 'ropes'"),
        (("--op", "rope", "--case", "nope"), "no tiny case of rope has 'nope' in its name"),
        (("--backend", "tpu"), "no backend 'tpu'"),
    ):
        done = _run("verify", *args)
        assert isinstance(done.exception, ConfigError)
        assert says in str(done.exception)
    (tmp_path / "file").touch()
    done = _run("verify", "--backend", "cpu", "--report", tmp_path / "file")
    assert isinstance(done.exception, ConfigError)


def test_verify_that_only_saw_refusals_verified_nothing(wrong_swiglu, monkeypatch):
    def refused(op, backend):
        return [k for k in op.tried("cpu") if k.provider != "c++"]

    monkeypatch.setattr("v4_ascend.runtime.verify._kernels", refused)
    done = _run("verify", "--backend", "cpu", "--op", "swiglu", "--case", "bfloat16-1x8")
    assert isinstance(done.exception, ParityError)


def test_every_row_of_the_page_carries_its_mark():
    results = {
        proof: [Result("rope", "1x8", f"kernel_{i}", "torch", "passed", proof)]
        for i, proof in enumerate(MARKS)
    }
    text = page(facts(results, Selection()))
    assert list(MARKS) == list(get_args(Proof)) == ["executed", "interpreted", "emulated call"]
    for i, (proof, means) in enumerate(MARKS.items()):
        (row,) = [r for r in re.findall(r"<tr.*?</tr>", text, re.S) if f"kernel_{i}<" in r]
        assert [p for p in MARKS if f">{p}<" in row] == [proof]
        assert means in html.unescape(text)
