"""Quantities as people read them."""

from __future__ import annotations

import math

_BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_OPERATIONS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))


def human(resource: str, value: float, limit: float | None = None, up: bool = False) -> str:
    """For people: "61.0 MiB", with a limit "61.0 / 64.0 MiB"; in FLOP where the resource is not bytes."""
    scale = _BYTES if resource.endswith("bytes") else _OPERATIONS
    if limit and not 0.01 <= value / limit <= 100:  # one unit would show a zero
        return f"{human(resource, value)} / {human(resource, limit)}"
    unit, size = next((each for each in scale if max(value, limit or 0) >= each[1]), scale[-1])
    used = f"{math.ceil(10 * value / size) / 10 if up else value / size:.1f}"
    return f"{used} {unit}" if limit is None else f"{used} / {limit / size:.1f} {unit}"
