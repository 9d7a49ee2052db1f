"""docs/performance.md shows what the reports say; run this file to renew it."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
DOC = DOCS / "performance.md"
REPORTS = sorted(DOCS.glob("reports/*/bench-ops-*.json"))
PLACE = re.compile(r"(<!-- tables: begin -->\n).*(<!-- tables: end -->)", re.DOTALL)


def cell(row):
    if row is None:
        return ""
    share = row["floor"] / row["seconds"]
    return f"{row['seconds'] * 1e6:,.1f} ({share:.0%})"


def table(report):
    data = json.loads(report.read_text())["data"]
    work = {name: {(r["op"], r["what"]): r for r in rows} for name, rows in data["work"].items()}
    names = list(dict.fromkeys(key for rows in work.values() for key in rows))
    rates = data["rates"]["products"]
    lines = [
        f"**{data['model']}**, {data['machine']['device']}: copy "
        f"{data['rates']['copy'] / 1e9:,.0f} GB/s, bf16 {rates['bf16'] / 1e12:,.0f} and FP8 "
        f"{rates['fp8'] / 1e12:,.0f} TFLOP/s.",
        "",
        f"| | {' | '.join(work)} |",
        "|---|" + "---|" * len(work),
    ]
    for op, what in names:
        cells = " | ".join(cell(rows.get((op, what))) for rows in work.values())
        lines.append(f"| `{op}` {what} | {cells} |".replace("`  |", "` |"))
    return "\n".join(lines) + "\n"


def renewed(text):
    tables = "\n".join(table(report) for report in REPORTS)
    return PLACE.sub(lambda m: f"{m[1]}\n{tables}\n{m[2]}", text)


def test_the_page_shows_what_the_reports_say():
    assert REPORTS
    text = DOC.read_text(encoding="utf-8")
    assert renewed(text) == text


if __name__ == "__main__":
    DOC.write_text(renewed(DOC.read_text(encoding="utf-8")), encoding="utf-8")
