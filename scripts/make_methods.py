"""Write docs/methods.md, the methods with their rules, from the table and the docstrings.

python scripts/make_methods.py docs/methods.md
"""

from __future__ import annotations

import argparse
import inspect
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from lamina.methods import METHODS
from lamina.methods.about import describe, own_fields, written

INTRO = """# Methods

Made by `python scripts/make_methods.py docs/methods.md` from the table of methods and their docstrings.
`lamina methods` prints the same in short, `lamina methods NAME --json` for programs. All methods are planned, priced
and budgeted by the same functions; a method lists plans and never prices itself. The settings that every method has
are in [keys.md](keys.md).
"""


def page() -> str:
    """The whole page."""
    rows = [describe(name) for name in METHODS]
    parts = [INTRO, overview(rows)]
    for group, members in groupby(rows, key=lambda row: row["group"]):
        parts.append(f"## {group.capitalize()}\n")
        parts += [section(row) for row in members]
    return "\n".join(parts)


def overview(rows: list[dict[str, Any]]) -> str:
    """One line per method."""
    lines = ["| method | group | what is cut | a device keeps | tasks | source |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row["group"], row["cuts"], row["stateful"] or "nothing", ", ".join(row["tasks"]), row["source"])
        lines.append(f"| [{row['name']}](#{row['name']}) | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def section(row: dict[str, Any]) -> str:
    """A method: its docstring, what it does to memory, and its own settings."""
    doc = re.sub(r"^Attributes:\n.*", "", inspect.getdoc(METHODS[row["name"]]) or "", flags=re.DOTALL | re.MULTILINE)
    lines = [f"### {row['name']}", "", escaped(doc.strip()), "", f"**Memory:** {row['note']}", ""]
    if fields := own_fields(row):
        lines += ["| setting | default | accepts | |", "|---|---|---|---|"]
        for key, each in fields.items():
            cells = (f"`{key}`", f"`{written(each['default'])}`", each["accepts"], each["meaning"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text in which stars and underscores of formulas stay what they are; bold words and code are left alone."""
    parts = re.split(r"(`[^`]*`|\*\*\w+:\*\*)", text)
    return "".join(part if i % 2 else re.sub(r"([*_<])", r"\\\1", part) for i, part in enumerate(parts))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write docs/methods.md.")
    parser.add_argument("path", type=Path)
    parser.parse_args().path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
