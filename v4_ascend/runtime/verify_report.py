"""A verification as JSON, JUnit and one page that needs nothing else."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from jinja2 import Environment, StrictUndefined

from v4_ascend import __version__
from v4_ascend.runtime.verify import Result, Selection

MARKS = {
    "executed": "on the device the kernel is for",
    "interpreted": "the kernel's own program, step by step on this CPU",
    "emulated call": "the vendor's call was real and checked; its numbers came from a stand-in",
}


def facts(results: Mapping[str, list[Result]], selection: Selection) -> dict[str, Any]:
    """Return everything a report says."""
    rows = [asdict(r) | {"backend": b} for b, of_backend in results.items() for r in of_backend]
    return {
        "v4_ascend": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "selection": asdict(selection),
        "counts": dict(Counter(r["outcome"] for r in rows)),
        "failed": [r for r in rows if r["outcome"] == "failed"],
        "results": rows,
    }


def write_report(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``index.html``, ``report.json`` and ``junit.xml``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.json", json.dumps(summary, indent=1)),
        ("junit.xml", junit(summary)),
        ("index.html", page(summary)),
    ):
        half = folder / f".{name}.{os.getpid()}"
        half.write_text(text, encoding="utf-8")
        half.replace(folder / name)


def junit(summary: dict[str, Any]) -> str:
    """Return JUnit XML: a test case per kernel and case; a refusal is a skip with its reason."""
    suite = ElementTree.Element("testsuite", name="v4-ascend verify")
    counts = summary["counts"]
    suite.set("tests", str(len(summary["results"])))
    suite.set("failures", str(counts.get("failed", 0)))
    suite.set("skipped", str(counts.get("refused", 0)))
    for r in summary["results"]:
        name = f"{r['kernel']}-{r['case']} ({r['proof']})"
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{r['backend']}.{r['op']}", name=name
        )
        case.set("time", f"{r['seconds']:.4f}")
        if r["outcome"] == "failed":
            ElementTree.SubElement(case, "failure", message=r["why"])
        elif r["outcome"] == "refused":
            ElementTree.SubElement(case, "skipped", message=r["why"])
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def page(summary: dict[str, Any]) -> str:
    """Return the page: a matrix op x kernel, and every case behind it."""
    text = (files("v4_ascend.runtime") / "verify_report.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    return template.render(s=summary, rows=_by_kernel(summary), marks=MARKS)


def _by_kernel(summary: dict[str, Any]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in summary["results"]:
        groups.setdefault((r["op"], r["backend"], r["kernel"]), []).append(r)
    rows = []
    for (op, backend, kernel), results in groups.items():
        counts = Counter(r["outcome"] for r in results)
        rows.append(
            {
                "op": op,
                "backend": backend,
                "kernel": kernel,
                "provider": results[0]["provider"],
                "proof": results[0]["proof"],
                "counts": counts,
                "state": "failed"
                if counts["failed"]
                else "passed"
                if counts["passed"]
                else "refused",
                "used": max(r["used"] for r in results),
                "seconds": sum(r["seconds"] for r in results),
                "results": results,
            }
        )
    return rows
