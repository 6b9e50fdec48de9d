"""A table, before it is drawn in a terminal or written as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text; `left` is the number of columns that are words rather than numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def printable(text: str) -> str:
    """Text without what would command a terminal and is not allowed in a page: a mark stands in its place."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
