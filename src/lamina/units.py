"""Quantities as people read them."""

from __future__ import annotations

import math

_BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_OPERATIONS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
_TIMES = (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0), ("s", 1.0))


def unit(resource: str, value: float) -> tuple[str, float]:
    """The unit that a value is best read in, and its size: bytes, seconds, or else FLOP, by the end of the name."""
    scale = _BYTES if resource.endswith("bytes") else _TIMES if resource.endswith("seconds") else _OPERATIONS
    return next((each for each in scale if value >= each[1]), scale[-1])


def human(resource: str, value: float, limit: float | None = None, up: bool = False, among: float = 0.0) -> str:
    """For people: "61.0 MiB", with a limit "61.0 / 64.0 MiB"; in FLOP where the resource is not bytes.

    Args:
        resource: Kind of the value, by the end of its name.
        value: What is told.
        limit: Of the value.
        up: Round up.
        among: The largest of a column, whose unit is taken where it would not show a zero.
    """
    if limit and not 0.01 <= value / limit <= 100:  # one unit would show a zero
        return f"{human(resource, value)} / {human(resource, limit)}"
    name, size = unit(resource, max(value, limit or 0, among if value >= 0.01 * among else 0))
    used = f"{math.ceil(10 * value / size) / 10 if up else value / size:.1f}"
    return f"{used} {name}" if limit is None else f"{used} / {limit / size:.1f} {name}"


def duration(seconds: float) -> str:
    """For people: "0.8 s", "12 s", "3 min 20 s", "2 h 05 min", "3 d 04 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for size, name, part, part_name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        parts, per = round(seconds / part), size // part
        if parts >= per:
            return f"{parts // per} {name} {parts % per:02} {part_name}"
    return f"{seconds:.0f} s"
