"""docs/errors.md has every known error; run this file to renew its table."""

from pathlib import Path

from v4_ascend.deploy.explain.entries import all_entries

DOC = Path(__file__).parents[1] / "docs" / "errors.md"
MARK = "<!-- generated: python tests/test_errors_doc.py -->\n"


def cell(text):
    return text.replace("|", "\\|")


def table():
    rows = [MARK]
    for layer in dict.fromkeys(e.layer for e in all_entries()):
        rows.append(f"\n## {layer}\n\n| error | what it is | why | what to do | source |\n")
        rows.append("|---|---|---|---|---|\n")
        for e in (e for e in all_entries() if e.layer == layer):
            kind = " (consequence)" * e.is_consequence + " (wrapper)" * e.is_wrapper
            link = f"[{e.evidence}]({e.source})" if e.source.startswith("http") else e.source
            if " and " in e.source:
                link = f"{e.evidence}: {e.source}"
            steps = "; ".join(e.next)
            cells = (f"{e.id}{kind}", e.title, e.cause, steps, f"{link}, {e.date}")
            rows.append(f"| {' | '.join(map(cell, cells))} |\n")
    return "".join(rows)


def test_the_page_has_every_known_error():
    text = DOC.read_text(encoding="utf-8")
    assert MARK in text
    assert text[text.index(MARK) :] == table()


if __name__ == "__main__":
    text = DOC.read_text(encoding="utf-8")
    DOC.write_text(text[: text.index(MARK)] + table(), encoding="utf-8")
