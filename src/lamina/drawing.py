"""How the examples of a task are spread over its devices: as data for programs, and drawn with characters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.cells import cell_len, set_cell_size

from lamina.data.task import Task
from lamina.table import Table

SHADES = " ░▒▓█"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_ROWS = 20  # devices of the map
_BINS = 8  # of the histogram
_NAME = 20  # cells of a name
_BAR = 40  # cells of the longest bar
_CELL = 12  # cells of a kind, where there is room


def spread(task: Task, class_of: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
    """Who has how many examples of what, as plain data; documented in docs/json.md.

    The overlap of two mixes is the sum over the kinds of the smaller of the two shares: 1 where they are the same, 0
    where they have no kind in common (one minus their total variation distance).

    Args:
        task: The examples; every device has at least one for training.
        class_of: Class of every device, [devices].
        classes: Names of the classes.
    """
    mix, groups = task.mix, np.asarray(class_of)
    overlap = _overlap(mix, mix.sum(axis=0))
    devices = [
        {
            "name": task.names[row],
            "class": classes[class_of[row]],
            "examples": int(mix[row].sum()),
            "test_examples": len(task.test[row]),
            "overlap": float(overlap[row]),
            "mix": {task.kinds[kind]: int(mix[row, kind]) for kind in np.flatnonzero(mix[row])},
        }
        for row in range(len(mix))
    ]
    members = {name: np.flatnonzero(groups == index) for index, name in enumerate(classes)}
    return {
        "kinds": list(task.kinds),
        "examples": int(mix.sum()),
        "test_examples": sum(map(len, task.test)),
        "classes": [
            {
                "name": name,
                "devices": len(rows),
                "examples": int(mix[rows].sum()),
                "kinds": int((mix[rows].sum(axis=0) > 0).sum()),
                "overlap": float(overlap[rows].mean()) if len(rows) else None,
                "pooled_overlap": float(_overlap(mix[rows].sum(axis=0), mix.sum(axis=0))) if len(rows) else None,
            }
            for name, rows in members.items()
        ],
        "devices": devices,
    }


def drawn(found: Mapping[str, Any], width: int) -> list[Table]:
    """What `spread` found, in tables of at most `width` cells: totals, sizes, overlaps, and a map devices x kinds."""
    return [_totals(found), _sizes(found, width), _overlaps(found), _map(found, width)]


def _overlap(mix: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Overlap of mixes [..., kinds] with that of the whole, [kinds]: [...]."""
    overlap: np.ndarray = np.minimum(mix / mix.sum(axis=-1, keepdims=True), whole / whole.sum()).sum(axis=-1)
    return overlap


def _totals(found: Mapping[str, Any]) -> Table:
    """How many examples there are, and how many a device has."""
    rows = []
    for name, key in (("training", "examples"), ("test", "test_examples")):
        sizes = [device[key] for device in found["devices"]]
        rows.append((name, *(f"{n:,.0f}" for n in (sum(sizes), min(sizes), np.median(sizes), max(sizes)))))
    title = f"Data: {_many(len(found['devices']), 'device')}, {_many(len(found['kinds']), 'kind')}"
    return Table(title, ("examples", "all", "smallest device", "median", "largest"), rows)


def _sizes(found: Mapping[str, Any], width: int) -> Table:
    """A histogram of the training examples of the devices."""
    sizes = np.array([device["examples"] for device in found["devices"]])
    edges = _edges(sizes)
    counts, _ = np.histogram(sizes, [*edges[:-1], edges[-1] - 0.5])
    texts = [f"{low:,}" if end == low + 1 else f"{low:,} to {end - 1:,}" for low, end in pairwise(edges)]
    widest = max(map(len, (*texts, "examples")))
    unit = counts.max() / max(1, min(_BAR, width - widest - 20))
    rows = [(text.rjust(widest), f"{n:>7,}", _bar(n / unit)) for text, n in zip(texts, counts, strict=True)]
    return Table("Devices by number of training examples", ("examples".rjust(widest), "devices", ""), rows, left=3)


def _edges(sizes: np.ndarray) -> list[int]:
    """First sizes of the bins, and the end of the last; of equal ratio where sizes differ much, else of equal width."""
    low, end = int(sizes.min()), int(sizes.max()) + 1
    space = np.geomspace if end > 20 * low else np.linspace
    inner = space(low, end, min(_BINS, end - low) + 1)[1:-1]
    return sorted({low, *np.ceil(inner - 1e-6).astype(int).tolist(), end})


def _bar(length: float) -> str:
    """A bar of so many cells, to an eighth; the shortest there is for little more than nothing."""
    eighths = max(round(8 * length), int(length > 0))
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _overlaps(found: Mapping[str, Any]) -> Table:
    """Per class: what it has, and how near its mix is to that of all."""
    rows = [
        (
            each["name"],
            *(f"{each[key]:,}" for key in ("devices", "examples", "kinds")),
            *("-" if each[key] is None else f"{each[key]:.0%}" for key in ("overlap", "pooled_overlap")),
        )
        for each in found["classes"]
    ]
    head = ("class", "devices", "examples", "kinds", "each device", "together")
    return Table("Classes, and the overlap of their mix of kinds with that of all devices", head, rows)


def _map(found: Mapping[str, Any], width: int) -> Table:
    """Devices x kinds, each cell shaded by the kinds' share of the device's examples."""
    names = [each["name"] for each in found["classes"]]
    devices = sorted(found["devices"], key=lambda device: names.index(device["class"]))
    picked = [devices[i * len(devices) // _ROWS] for i in range(_ROWS)] if len(devices) > _ROWS else devices
    heads = ["device", "class", "examples"]
    rows = [[_cut(each["name"], _NAME), _cut(each["class"], _NAME), f"{each['examples']:,}"] for each in picked]
    taken = [max(map(cell_len, column)) for column in zip(heads, *rows, strict=True)]
    room = max(1, width - sum(taken) - 3 * len(taken) - 4)  # what the gaps and the frame of the map leave
    columns, cell = _columns(found["kinds"], room)
    bounds = _bounds(len(columns))
    for row, device in zip(rows, picked, strict=True):
        shares = (sum(device["mix"].get(kind, 0) for kind in kinds) / device["examples"] for kinds in columns)
        row[2] = row[2].rjust(taken[2])
        row.append(f"▏{''.join(SHADES[bisect_left(bounds, share)] * cell for share in shares)}▕")
    low, middle, high = (f"{float(f'{100 * bound:.2g}'):g}%" for bound in bounds[1:])
    legend = f" ░ ≤{low} ▒ ≤{middle} ▓ ≤{high} █ >{high}"
    if cell > 4:
        legend += "\n " + "".join(set_cell_size(_cut(kinds[0], cell - 1), cell) for kinds in columns).rstrip()
    return Table(_map_title(found, len(picked), columns), (*heads[:2], heads[2].rjust(taken[2]), legend), rows, left=4)


def _map_title(found: Mapping[str, Any], shown: int, columns: Sequence[Sequence[str]]) -> str:
    kinds, devices = found["kinds"], len(found["devices"])
    title = "Share of each kind in the examples of a device"
    if len(kinds) > 1:
        title += f"; kinds from {_cut(kinds[0], _NAME)} to {_cut(kinds[-1], _NAME)}"
    if len(columns) < len(kinds):
        title += f", {len(columns[0])} to a column"
    return title + (f"; {shown} of {devices} devices, evenly picked" if shown < devices else "")


def _columns(kinds: Sequence[str], room: int) -> tuple[list[Sequence[str]], int]:
    """The kinds of each column of the map, and the cells a column takes."""
    each = -(-len(kinds) // room)
    columns = [kinds[start : start + each] for start in range(0, len(kinds), each)]
    return columns, min(_CELL, room // len(columns))


def _bounds(columns: int) -> tuple[float, ...]:
    """Largest share of each shade but the last: nothing, half of an even share, and a third of the way to 1 each."""
    even = 1 / columns
    return 0.0, even / 2, even ** (2 / 3), even ** (1 / 3)


def _cut(text: str, cells: int) -> str:
    """Text on one line of at most so many cells."""
    text = " ".join(text.split())
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1).rstrip() + "…"


def _many(count: int, name: str) -> str:
    return f"{count:,} {name}{'s' * (count != 1)}"
