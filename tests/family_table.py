"""The docs' table of VAEs, made from the table that the tests run over.

python tests/family_table.py --write
"""

from __future__ import annotations

import sys
from pathlib import Path

from families import FAMILIES, OUT_OF_SCOPE, Family

PAGE = Path(__file__).parent.parent / "docs" / "supported.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"
LEFT_OUT = "| not in the table | why |\n|---|---|\n"


def make_table() -> str:
    lines = ["| class | ratio (space / time) | encode | decode | tolerance |", "|---|---|---|---|---|"]
    classes: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        classes.setdefault(family.model, []).append(family)
    for model, rows in classes.items():
        ratios = ", ".join(dict.fromkeys(f"{space} / {time}" for space, time in (row.ratio for row in rows)))
        halves = [_verdict(rows, half) for half in ("encode", "decode")]
        tolerance = max(row.tolerance for row in rows)
        lines.append(f"| `{model}` | {ratios} | {halves[0]} | {halves[1]} | {tolerance:.0e} |")
    left_out = "".join(f"| `{name}` | {why} |\n" for name, why in OUT_OF_SCOPE.items())
    return "\n".join(lines) + "\n\n" + LEFT_OUT + left_out


def _verdict(rows: list[Family], half: str) -> str:
    present = [row for row in rows if getattr(row, half)]
    if not present:
        return "-"
    return "exact" if all(getattr(row, f"exact_{half}") for row in present) else "refused"


def table_in_docs() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        print(make_table(), end="")
    else:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + make_table() + END + rest.split(END)[1])
