"""Marks of a chart as SVG text: elements, scales, axes, lines, and labels that keep clear of each other.

Sizes and positions are in pixels of the chart, from its top left corner. Colours are classes of `STYLE`: `s0` to
`s7` for things that keep their colour throughout a page, `m0` to `m4`, all of one hue, for all else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from lamina.table import printable
from lamina.units import duration, human, unit

COLOURS, SHAPES = 8, 3
WIDE, LONGEST = 900.0, 300.0  # width of a chart across the page, and of a name in it at most
STYLE = (Path(__file__).parent / "chart.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Chart:
    """A finished drawing.

    Attributes:
        name: Of its file, without an ending.
        title: What is asked.
        note: How to read it.
        svg: The drawing, which the style of a page colours.
    """

    name: str
    title: str
    note: str
    svg: str

    def file(self) -> str:
        """The drawing as a file of its own, in the colours for paper."""
        head = '<svg xmlns="http://www.w3.org/2000/svg" '
        return self.svg.replace("<svg ", head, 1).replace(">", f"><style>{escape(STYLE, quote=False)}</style>", 1)


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linearly: `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1) * (self.end - self.start)


@dataclass(frozen=True)
class Quantity:
    """What an axis shows: its name, and the kind of its values ("share", "bytes", "flops", "seconds" or "count")."""

    name: str
    kind: str

    def text(self, value: float) -> str:
        """A value in full, as it is shown on hovering."""
        if self.kind == "share":
            return f"{value:.1%}"
        if self.kind == "seconds":
            return duration(value)
        return f"{value:g}" if self.kind == "count" else human(self.kind, value)

    def scaled(self, top: float) -> tuple[str, float]:
        """The name of the axis with its unit, and the size of the unit, where the largest value is `top`."""
        if self.kind in ("share", "count"):
            return (f"{self.name} (%)", 0.01) if self.kind == "share" else (self.name, 1.0)
        name, size = unit(self.kind, top)
        return f"{self.name} ({name})", size


def tag(kind: str, /, inside: str = "", tip: str = "", **attributes: object) -> str:
    """An element; `tip` is shown on hovering, `class_` is the class. `inside` is SVG already, all else is escaped."""
    texts = ((key.rstrip("_").replace("_", "-"), _written(value)) for key, value in attributes.items())
    written = "".join(f' {key}="{escape(value)}"' for key, value in texts)
    inside = f"<title>{escape(tip)}</title>{inside}" if tip else inside
    return f"<{kind}{written}>{inside}</{kind}>"


def _written(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def words(x: float, y: float, said: str, class_: str = "", anchor: str = "start") -> str:
    """Text whose baseline begins, ends or has its middle at (x, y)."""
    return tag("text", escape(said), x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def name(x: float, y: float, said: str, class_: str = "", anchor: str = "start", most: float = LONGEST) -> str:
    """The name of something: as `words`, but a long one is shortened, and shown in full on hovering."""
    drawn = short(said, most)
    tip = said if drawn != said else ""
    return tag("text", escape(drawn), tip=tip, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def short(said: str, most: float = LONGEST) -> str:
    """A name no wider than `most`: a long one without its middle, for names often differ at their ends."""
    if width(said) <= most:
        return said
    cuts = (f"{said[: n - n // 2]}…{said[len(said) - n // 2 :]}" for n in range(min(len(said), 100), 0, -1))
    return next((cut for cut in cuts if width(cut) <= most), "…")


def width(said: str) -> float:
    """About as wide as a text is drawn, where it is bold."""
    return sum(_broad(letter) for letter in said)


def _broad(letter: str) -> float:
    if letter in "MW@%" or east_asian_width(letter) in "WF":
        return 14.0
    return 9.2 if letter.isupper() else 7.4


def room(names: Iterable[str]) -> float:
    """Room for names that end before an axis."""
    return 24 + max(width(short(each)) for each in names)


def between(names: Iterable[str], said: Iterable[str], least: float = 300) -> tuple[float, float, float]:
    """Where an axis begins and ends that has names at its left and texts at its right, and the width of the chart."""
    left, right = room(names), 24 + max(map(width, said))
    wide = max(WIDE, left + least + right)
    return left, wide - right, wide


def colour(index: int) -> str:
    """Class of the colour of the `index`-th thing; a ninth has the colour of the first, and another shape."""
    return f"s{index % COLOURS}"


def point(x: float, y: float, tip: str, index: int, class_: str = "", hollow: bool = False) -> str:
    """A mark of the colour, or else the class, and of the shape of the `index`-th thing: circle, square or diamond."""
    look: dict[str, Any] = {
        "class_": f"{class_ or colour(index)} {'hollow' if hollow else 'fill'} hit point",
        "tip": tip,
    }
    shape = index // COLOURS % SHAPES
    if shape == 0:
        return tag("circle", cx=float(x), cy=float(y), r=4.5, **look)
    turn: dict[str, Any] = {"transform": f"rotate(45 {_written(float(x))} {_written(float(y))})"} if shape == 2 else {}
    return tag("rect", x=x - 4.0, y=y - 4.0, width=8, height=8, **look, **turn)


def cross(x: float, y: float, tip: str, index: int) -> str:
    """A mark in the place of a point, in the colour of the `index`-th thing."""
    path = " ".join(f"M{_written(x - 4 * turn)} {_written(y - 4)}l{8 * turn} 8" for turn in (1, -1))
    return tag("path", d=path, class_=f"line {colour(index)} hit", tip=tip)


def line(points: Sequence[tuple[float, float]], class_: str, tip: str = "") -> str:
    """A line through points in pixels."""
    return tag("polyline", tip=tip, points=_path(points), class_=class_)


def band(low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], class_: str) -> str:
    """The area between two lines in pixels."""
    return tag("polygon", points=_path([*low, *reversed(high)]), class_=class_)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{_written(float(x))},{_written(float(y))}" for x, y in points)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most about `most`: 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Iterable[float], share: float = 0.08) -> tuple[float, float]:
    """Bounds around shares with some air, between 0 and 1, apart even where the values are all the same."""
    found = list(values)
    air = (max(found) - min(found)) * share or abs(max(found)) * share or 1.0
    return max(0.0, min(found) - air), min(1.0, max(found) + air)


def about(mean: float, std: float) -> tuple[float, float]:
    """A standard deviation to both sides of a share, between 0 and 1."""
    return max(0.0, mean - std), min(1.0, mean + std)


def axes(x: Scale, y: Scale, across: Quantity, up: Quantity | None) -> str:
    """Grid, numbers and names of both axes; without `up` only those across. Values are in the units of the data."""
    parts, bottom = [], max(y.start, y.end)
    title, size = across.scaled(max(abs(x.low), abs(x.high)))
    for value in ticks(x.low / size, x.high / size, max(2, int(abs(x.end - x.start) / 70))):
        at = x(value * size)
        parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(words(at, bottom + 17, f"{value:.6g}", "soft", "middle"))
        if up is None:
            parts.append(tag("line", x1=at, x2=at, y1=min(y.start, y.end), y2=bottom, class_="rule"))
    parts.append(words((x.start + x.end) / 2, bottom + 34, title, "soft", "middle"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=bottom, y2=bottom, class_="axis"))
    if up is not None:
        title, size = up.scaled(max(abs(y.low), abs(y.high)))
        for value in ticks(y.low / size, y.high / size):
            at = y(value * size)
            parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="rule"))
            parts.append(words(x.start - 7, at + 4, f"{value:.6g}", "soft", "end"))
        parts.append(words(4, min(y.start, y.end) - 10, title, "soft"))
    return "".join(parts)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the order of those wanted, at least `gap` apart and from `low` on; the nearest in squares.

    They end at `high` if there is room. Without the gaps it is an isotonic regression, by pooling neighbours
    that are in the wrong order (Barlow et al. 1972).
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[tuple[float, int]] = []  # mean and number
    for rank, i in enumerate(order):
        mean, count = wanted[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    last = max(low, high - gap * (len(wanted) - 1))
    starts = [min(max(mean, low), last) for mean, count in pools for _ in range(count)]
    placed = dict(zip(order, (start + rank * gap for rank, start in enumerate(starts)), strict=True))
    return [placed[i] for i in range(len(wanted))]


def drawing(width: float, height: float, label: str, *parts: str) -> str:
    """The whole of a chart; `label` says in words what it shows."""
    return tag(
        "svg",
        printable("".join(parts)),
        viewBox=f"0 0 {_written(float(width))} {_written(float(height))}",
        width=float(width),
        role="img",
        aria_label=label,
    )


def legend(entries: Mapping[str, str], x: float, y: float) -> str:
    """Squares of classes, each with its name, in one row."""
    parts: list[str] = []
    for said, class_ in entries.items():
        parts.append(tag("rect", x=x, y=y - 10, width=11, height=11, class_=class_))
        parts.append(words(x + 16, y, said, "soft"))
        x += 30 + width(said)
    return "".join(parts)


def labels(found: Sequence[tuple[str, str, float, float]], at: float, low: float, high: float) -> str:
    """Names in a column from `at` on, clear of each other, each with a line from what it names.

    Args:
        found: Name, class, and where what it names lies.
        at: Where the column begins.
        low: Highest place of a name.
        high: Lowest place.
    """
    parts = []
    for (said, class_, x, y), free in zip(found, spread([y for *_, y in found], 14, low, high), strict=True):
        parts.append(tag("line", x1=x + 3, y1=y, x2=at - 3, y2=free, class_=f"{class_.split()[0]} lead"))
        parts.append(name(at, free + 4, said, class_))
    return "".join(parts)
