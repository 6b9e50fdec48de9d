"""The charts of a run, from what its folder holds; see docs/json.md for the names in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.report import marks
from lamina.report.marks import Chart, Quantity, Scale, colour, tag, words
from lamina.units import human

Row = Mapping[str, Any]
Tally = Counter[tuple[int, str, tuple[int, ...] | None, str | None]]
"""Lines of devices.jsonl by round, class, trained blocks (None: there is no usable update) and reason of rejection."""
KINDS = {"mean_over_devices": "mean of devices", "weighted": "weighted", "p10": "10th percentile"}
ACCURACY = Quantity("accuracy", "share")
COSTS = {
    "round": Quantity("rounds", "count"),
    "up_bytes": Quantity("data sent by devices", "bytes"),
    "flops": Quantity("compute", "flops"),
    "clock_seconds": Quantity("virtual time", "seconds"),
}
LEFT, TOP, TALL = 52.0, 34.0, 210.0
CELL, ROW = 34.0, 30.0
_COLUMNS = 60  # of a map, at most


def progress(summary: Row, rounds: Sequence[Row]) -> dict[str, list[tuple[dict[str, float], float]]]:
    """Kind of accuracy -> (what it had cost by then, accuracy), from before the first round on."""
    spent = dict.fromkeys(COSTS, 0.0)
    found = {kind: [(dict(spent), summary["accuracy"]["before"][kind])] for kind in KINDS}
    for row in rounds:
        spent |= {key: spent[key] + row[key] for key in ("up_bytes", "flops")}
        spent |= {"round": row["round"], "clock_seconds": row.get("clock_seconds", 0.0)}
        for kind, points in found.items():
            if row["accuracy"]:
                points.append((dict(spent), row["accuracy"][kind]))
    return found


def costs(summary: Row) -> dict[str, Quantity]:
    """The axes of cost: without virtual time where no rates were given."""
    return {key: each for key, each in COSTS.items() if key != "clock_seconds" or summary["totals"].get(key)}


def curves(summary: Row, rounds: Sequence[Row]) -> list[Chart]:
    """Accuracy over each axis of cost: mean, weighted (where it is another) and p10."""
    found = progress(summary, rounds)
    kinds = [k for k in KINDS if k != "weighted" or _apart(found[k], found["mean_over_devices"])]
    looks = dict(zip(kinds, ("m2", "m4", "m1"), strict=False))
    low, high = marks.padded(value for kind in kinds for _, value in found[kind])
    y = Scale(low, high, TOP + TALL, TOP)
    made = []
    for key, across in costs(summary).items():
        x = Scale(0, max(spent[key] for spent, _ in found["p10"]) or 1, LEFT, 330)
        parts = [marks.axes(x, y, across, ACCURACY)]
        for kind in kinds:
            parts.append(marks.line([(x(spent[key]), y(v)) for spent, v in found[kind]], f"line {looks[kind]}"))
            for spent, value in found[kind]:
                tip = f"{KINDS[kind]}: {value:.1%}, {across.name} {across.text(spent[key])}"
                parts.append(marks.point(x(spent[key]), y(value), tip, 0, looks[kind]))
        last = {kind: found[kind][-1] for kind in kinds}
        ends = [(KINDS[k], f"{looks[k]} own", x(spent[key]), y(value)) for k, (spent, value) in last.items()]
        parts.append(marks.labels(ends, 347, TOP + 4, TOP + TALL))
        title = f"Accuracy over {across.name}"
        svg = marks.drawing(470, TOP + TALL + 42, title, *parts)
        made.append(Chart(f"accuracy-{key.split('_')[0]}", title, "", svg))
    return made


def _apart(some: Sequence[tuple[Any, float]], others: Sequence[tuple[Any, float]]) -> bool:
    return any(abs(a - b) >= 5e-5 for (_, a), (_, b) in zip(some, others, strict=True))


def gains(summary: Row) -> Chart | None:
    """Accuracy of each class before and after, on one axis."""
    rows = [(i, row) for i, row in enumerate(summary["classes"]) if row["accuracy"]]
    if not rows:
        return None
    both = [(i, row, *(row["accuracy"][w]["mean_over_devices"] for w in ("before", "after"))) for i, row in rows]
    said = [_gain(row, before, after) for _, row, before, after in both]
    left, right, wide = marks.between((row["name"] for _, row in rows), said)
    x = Scale(*marks.padded([v for *_, a, b in both for v in (a, b)]), left, right)
    y = [TOP + ROW * n for n in range(len(rows))]
    parts = [marks.axes(x, Scale(0, 1, TOP - 20, y[-1] + 22), ACCURACY, None)]
    for (index, row, before, after), text, at in zip(both, said, y, strict=True):
        tip = f"{row['name']}: {before:.1%} before, {after:.1%} after"
        parts.append(marks.name(left - 12, at + 4, row["name"], f"{colour(index)} own", "end"))
        parts.append(marks.line([(x(before), at), (x(after), at)], f"line {colour(index)}"))
        parts.append(marks.point(x(before), at, f"{tip} (before)", index, hollow=True))
        parts.append(marks.point(x(after), at, f"{tip} (after)", index))
        parts.append(words(right + 16, at + 4, text))
    title = "What each class gained"
    note = "Mean accuracy over the devices of a class: hollow before, full after. All get the same network."
    return Chart("classes", title, note, marks.drawing(wide, y[-1] + 64, title, *parts))


def _gain(row: Row, before: float, after: float) -> str:
    out = "" if row["plan"] else ", takes no part"
    return f"{before:.1%} → {after:.1%}  ({100 * (after - before):+z.1f} points{out})"


def picture(classes: Sequence[Row]) -> Chart | None:
    """Classes x parts of the network: the share of each part that is trained, held but frozen, or not held."""
    rows = [(i, row) for i, row in enumerate(classes) if row.get("parts") or not row["plan"]]
    names = next(([each["part"] for each in row["parts"]] for _, row in rows if row.get("parts")), None)
    if names is None:
        return None
    said = [f"{row['devices']} devices: {row['plan'] or 'sit out'}" for _, row in rows]
    size = min(CELL, 560 / len(names))
    left, _, wide = marks.between((row["name"] for _, row in rows), said, len(names) * size)
    parts = [marks.legend({"trained": "m2 fill", "held, frozen": "frozen", "not held": "none"}, left, 12)]
    tall, top = 26.0, 58.0
    for column, name in enumerate(names):
        short = {"embeddings": "emb", "head": "head"}.get(name, name.removeprefix("block "))
        if size > 18 or column in (0, len(names) - 1):
            parts.append(words(left + size * (column + 0.5), top - 10, short, "soft", "middle"))
    for number, ((index, row), text) in enumerate(zip(rows, said, strict=True)):
        at = top + number * (tall + 10)
        parts.append(marks.name(left - 12, at + 17, row["name"], f"{colour(index)} own", "end"))
        cells = row["parts"] or [{"part": name, "held": 0, "trained": 0} for name in names]
        for column, cell in enumerate(cells):
            parts.append(_cell(left + column * size, at, size - 3, tall, row["name"], index, cell))
        parts.append(words(left + len(names) * size + 10, at + 17, text))
    title = "Who trains what"
    note = (
        "From the input (left) to the head (right). A cell is filled by the share of its weights; a sliver is a "
        "low-rank addition. Where a method changes its plan from round to round, this is the first."
    )
    high = top + len(rows) * (tall + 10)
    return Chart("plan", title, note, marks.drawing(wide, high, title, *parts))


def _cell(x: float, y: float, wide: float, tall: float, name: str, index: int, cell: Row) -> str:
    """One part of the network on one class: filled from below by what is trained, above it what is frozen."""
    held, trained = (max(2.0, tall * share) if share else 0.0 for share in (cell["held"], cell["trained"]))
    frozen = max(0.0, held - trained)
    share = f"{cell['trained']:.0%} trained, {cell['held'] - min(cell['trained'], cell['held']):.0%} frozen"
    parts = [tag("rect", x=x, y=y, width=wide, height=tall, class_="none")]
    if frozen:
        parts.append(tag("rect", x=x, y=y + tall - held, width=wide, height=frozen, class_="frozen"))
    if trained:
        look = f"{colour(index)} fill trained"
        parts.append(tag("rect", x=x, y=y + tall - trained, width=wide, height=trained, class_=look))
    return tag("g", "".join(parts), tip=f"{name}, {cell['part']}: {share}")


def memory(classes: Sequence[Row]) -> Chart:
    """Peak memory of each class by category, predicted and, where it was measured, measured; its budget as a line."""
    bars = []
    for index, row in enumerate(classes):
        bars.append((index, row["name"], row, row["predicted"], "predicted"))
        if row.get("measured"):
            bars.append((index, "measured", row, row["measured"], "measured"))
    said = [_peak(row, used) for _, _, row, used, _ in bars]
    left, right, wide = marks.between((name for _, name, *_ in bars), said)
    top = max([used["peak_bytes"] for *_, used, _ in bars] + [row["budget"]["memory_bytes"] or 0 for row in classes])
    x = Scale(0, top, left, right)
    categories = list(classes[0]["predicted"]["memory"])
    heads = {key.removesuffix("_bytes"): f"m{i} fill" for i, key in enumerate(categories)}
    parts, drawn, at = [marks.legend(heads, left, 14)], [], 40.0
    for index, name, row, used, how in bars:
        tall = 20.0 if how == "predicted" else 12.0
        drawn.append(_bar(x, at, tall, name, row, used, how))
        style = f"{colour(index)} own" if how == "predicted" else "soft"
        drawn.append(marks.name(left - 12, at + tall / 2 + 4, name, style, "end"))
        at += tall + (4 if how == "predicted" and row.get("measured") else 14)
    parts.append(marks.axes(x, Scale(0, 1, 32, at), Quantity("peak memory", "bytes"), None))
    title = "Memory at the peak against the budget"
    more = ", and below as measured" if len(bars) > len(classes) else ""
    note = f"Live tensors on a device at the peak, as predicted{more}. The upright line is the budget."
    return Chart("memory", title, note, marks.drawing(wide, at + 44, title, *parts, *drawn))


def _bar(x: Scale, y: float, tall: float, name: str, row: Row, used: Row, how: str) -> str:
    """The categories of a peak end to end, what it is in words, and the budget."""
    parts, begin = [], 0.0
    for i, (category, size) in enumerate(used["memory"].items()):
        tip = f"{row['name']}, {how}: {category.removesuffix('_bytes')} {human('bytes', size)}"
        wide = x(begin + size) - x(begin)
        parts.append(tag("rect", x=x(begin), y=y, width=wide, height=tall, class_=f"m{i} fill hit", tip=tip))
        begin += size
    limit = row["budget"]["memory_bytes"]
    if limit:
        tip = f"{row['name']}: budget {human('bytes', limit)}"
        parts.append(tag("line", x1=x(limit), x2=x(limit), y1=y - 4, y2=y + tall + 4, class_="limit", tip=tip))
    parts.append(words(max(x(begin), x(limit or 0)) + 8, y + tall / 2 + 4, _peak(row, used)))
    return "".join(parts)


def _peak(row: Row, used: Row) -> str:
    return human("bytes", used["peak_bytes"], row["budget"]["memory_bytes"]) + ("" if row["plan"] else ", sits out")


def coverage(blocks: int, tally: Tally) -> Chart | None:
    """Rounds x blocks: the share of a round's usable updates that trained the block."""
    usable = [(number, trained, count) for (number, _, trained, _), count in tally.items() if trained is not None]
    if not usable:
        return None
    rounds = max(number for number, *_ in tally)
    each = -(-rounds // _COLUMNS)
    updates, trained = Counter[int](), Counter[tuple[int, int]]()
    for number, some, count in usable:
        column = (number - 1) // each
        updates[column] += count
        trained.update({(column, block): count for block in some})
    columns, left = -(-rounds // each), 76.0
    wide, tall = min(30.0, 680 / columns), max(10.0, min(22.0, 400 / blocks))
    parts = [
        words(
            left,
            12,
            "share of the updates of a round that trained the block: the stronger the colour, the larger",
            "soft",
        )
    ]
    for block in range(blocks):
        y = 24 + (blocks - 1 - block) * tall
        parts.append(words(left - 10, y + tall / 2 + 4, f"block {block}", "soft", "end"))
        for column in range(columns):
            count = updates[column]
            share = trained[column, block] / count if count else 0.0
            said = f"block {block}: {share:.0%} of {count} updates" if count else "no update was used"
            tip = f"round{_span(column, each)}, {said}"
            box: dict[str, Any] = {"x": left + column * wide, "y": y, "width": wide - 1.5, "height": tall - 1.5}
            parts.append(tag("rect", **box, class_="none"))
            parts.append(tag("rect", **box, class_="m2 fill share", opacity=float(share), tip=tip))
        whole = sum(trained[column, block] for column in updates) / updates.total()
        parts.append(words(left + columns * wide + 8, y + tall / 2 + 4, f"{whole:.0%}"))
    bottom = 24 + blocks * tall
    for value in dict.fromkeys(int(v) for v in marks.ticks(1, rounds, 8) or [1]):
        parts.append(words(left + ((value - 1) // each + 0.5) * wide, bottom + 15, str(value), "soft", "middle"))
    parts.append(words(left + columns * wide / 2, bottom + 33, "round", "soft", "middle"))
    title = "Which blocks learned, round by round"
    note = "At the right: over the whole run. A block that nobody trains stays as it was pretrained."
    if any(not updates[column] for column in range(columns)):
        note += " Where a column is empty, no update was used."
    return Chart("coverage", title, note, marks.drawing(900, bottom + 42, title, *parts))


def _span(column: int, each: int) -> str:
    first = column * each + 1
    return f" {first}" if each == 1 else f"s {first} to {first + each - 1}"


def of_run(summary: Row, rounds: Sequence[Row], tally: Tally) -> list[Chart]:
    """All charts that the data of a run allow, in reading order."""
    chosen = summary["network"]
    blocks = next(each["blocks"] for each in chosen["candidates"] if each["name"] == chosen["chosen"])
    made = [gains(summary), picture(summary["classes"]), memory(summary["classes"]), coverage(blocks, tally)]
    return [*curves(summary, rounds), *(chart for chart in made if chart)]
