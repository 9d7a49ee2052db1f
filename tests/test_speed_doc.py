"""The pages' tables of speed on a CPU are what the newest report says; run this to renew them.

``python tests/speed_report.py`` makes a report.
"""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REPORT = max((ROOT / "docs" / "reports").glob("*-cpu/speed.json"))


def runs():
    report = json.loads(REPORT.read_text())
    return {(r["model"], r["bench"]): r["data"] for r in report["runs"]}


def machine():
    report = json.loads(REPORT.read_text())
    m, rates = report["machine"], [r["data"]["rates"] for r in report["runs"]]
    copies = [r["copy"] / 1e9 for r in rates]
    products = [r["products"]["fp32"] / 1e9 for r in rates]
    return (
        f"{m['cpu']}, {m['cores']} cores{', AVX-512' * m['avx512']}, torch {m['torch']}, "
        f"{report['date']}; from run to run {min(copies):.0f} to {max(copies):.0f} GB/s copied "
        f"and {min(products):.0f} to {max(products):.0f} GFLOP/s in fp32:"
    )


def speed(data):
    """Ours in tokens per second, and how much of the floor that is."""
    ours = data["tokens_per_s"]["v4-ascend, cpu"]
    return f"{ours:,.0f} ({ours / data['floor']:.0%})"


def readme():
    found = runs()
    against = {
        "tiny, prefill of 512": ("tiny", "prefill --prompt 512 --against transformers"),
        "tiny, decode": ("tiny", "decode --prompt 512 --against transformers"),
        "121M, prefill of 2,048": ("121m", "prefill --prompt 2048 --against transformers"),
        "121M, decode": ("121m", "decode --prompt 2048 --against transformers"),
        "121M, decode of 8": ("121m", "decode --prompt 512 --batch 8 --against transformers"),
    }
    columns = {name: found[key] for name, key in against.items()}
    both = {name: list(data["tokens_per_s"].values()) for name, data in columns.items()}
    version = json.loads(REPORT.read_text())["machine"]["transformers"]
    lines = {
        "": list(columns),
        "v4-ascend, cpu": [f"{ours:,.0f}" for ours, _ in both.values()],
        f"transformers {version}": [f"{theirs:,.0f}" for _, theirs in both.values()],
        "ratio": [f"{ours / theirs:.2f}" for ours, theirs in both.values()],
        "of the floor": [
            f"{both[name][0] / data['floor']:.0%}" for name, data in columns.items()
        ],
    }  # fmt: skip
    return f"{machine()}\n\n{table(lines)}"


def table(lines):
    """Rows by their first cell; the first row is the head."""
    rows = [f"| {' | '.join([first, *cells])} |" for first, cells in lines.items()]
    rows.insert(1, "|---" * (1 + len(next(iter(lines.values())))) + "|")
    return "\n".join(rows)


def performance():
    found, behind = runs(), (2048, 8192, 16384)

    def cells(model, what):
        at = (found.get((model, f"{what} --chunk 2048 --prompt {n}")) for n in behind)
        return [speed(data) if data else "" for data in at]

    eight = "decode --prompt 512 --batch 8"
    lines = {
        "": [*(f"behind {n:,} tokens" for n in behind), "8 sequences behind 512"],
        "121M, prefill, fp32": [*cells("121m", "prefill"), ""],
        "121M, decode, fp32": [
            *cells("121m", "decode"), speed(found["121m", f"{eight} --against transformers"]),
        ],
    }  # fmt: skip
    for name, model in (("121M", "121m-fp8-fp4"), ("wide", "wide-fp8-fp4")):
        lines[f"{name}, prefill, FP8 and FP4"] = [*cells(model, "prefill"), ""]
        lines[f"{name}, decode, FP8 and FP4"] = [
            *cells(model, "decode"), speed(found[model, eight]),
        ]  # fmt: skip
    return f"{machine()}\n\n{table(lines)}"


def context():
    data = runs()["tiny", "context --batch 1 --batch 8 --plot {plot}"]
    contexts = sorted({p["context"] for p in data["points"]})
    points = {(p["batch"], p["context"]): p for p in data["points"]}
    lines = {"batch": [f"{n:,}" for n in contexts]}
    for batch in sorted({p["batch"] for p in data["points"]}):
        mine = [points[batch, n] for n in contexts]
        lines[str(batch)] = [
            f"{p['seconds'] * 1e3:.3g} ({p['floor'] / p['seconds']:.0%})" for p in mine
        ]
    return table(lines)


PLACES = {
    "README.md": {"speed": readme},
    "docs/performance.md": {"speed": performance, "context": context},
}


def renewed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in PLACES[page].items():
        before, begin, rest = text.partition(f"<!-- {name}: begin -->\n")
        _, end, after = rest.partition(f"\n<!-- {name}: end -->")
        assert begin, (page, name)
        assert end, (page, name)
        text = before + begin + make() + end + after
    return text


@pytest.mark.parametrize("page", PLACES)
def test_pages_show_what_the_report_says(page):
    assert renewed(page) == (ROOT / page).read_text(encoding="utf-8")


if __name__ == "__main__":
    for each in PLACES:
        (ROOT / each).write_text(renewed(each), encoding="utf-8")
