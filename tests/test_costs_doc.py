"""README's table of memory and speed is what `bench checkpoint` reported; run this to renew it.

``v4-ascend bench checkpoint ... --json > docs/reports/DATE-cpu/checkpoint.json`` makes a report;
the newest one counts.
"""

import json
import re
from pathlib import Path

import msgspec

from v4_ascend.checkpoint.costs import Costs, table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
REPORT = max((ROOT / "docs" / "reports").glob("*-cpu/checkpoint.json"))
PLACE = re.compile(r"(<!-- costs: begin -->\n).*(\n<!-- costs: end -->)", re.DOTALL)


def renewed(text):
    found = msgspec.convert(json.loads(REPORT.read_text())["data"], Costs)
    return PLACE.sub(lambda m: f"{m[1]}{table(found)}{m[2]}", text)


def test_the_readme_shows_what_the_report_says():
    text = README.read_text(encoding="utf-8")
    assert PLACE.search(text)
    assert renewed(text) == text


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
