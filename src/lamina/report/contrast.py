"""The charts of a comparison, from compare.json and from the rounds of its runs; see docs/json.md for the names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from lamina.fleet import RESOURCES
from lamina.report import marks
from lamina.report.charts import ACCURACY, COSTS, LEFT, ROW, TALL, TOP, progress
from lamina.report.marks import Chart, Quantity, Scale, colour, tag, words
from lamina.tables import WORST, by_class, percent

Row = Mapping[str, Any]
Curves = Mapping[str, Sequence[tuple[Row, Sequence[Row]]]]  # label -> per seed: summary and rounds
SPENT = {
    "memory_bytes": Quantity("memory at the peak", "bytes"),
    "up_bytes": COSTS["up_bytes"],
    "down_bytes": Quantity("data received by devices", "bytes"),
    "flops": COSTS["flops"],
}
WIDE, PANEL = 300.0, 140.0
BEYOND = "Hollow: beyond the budgets."


def mean_accuracy(row: Row) -> tuple[float, float]:
    """Mean over devices and seeds after the run, and its standard deviation over seeds (0 for one seed)."""
    after = row["accuracy"]["after"]["mean_over_devices"]
    return after["mean"], after["std"] or 0.0


def score(row: Row) -> str:
    """Mean accuracy of a method in words: "56.2±0.2%"."""
    return percent(row["accuracy"]["after"]["mean_over_devices"]) + "%"


def over_budget(row: Row) -> bool:
    """Whether any class of a method trains beyond its budget, as methods may that ignore budgets."""
    return any(
        each["plan"] and any(each["predicted"][key] > (each["budget"][key] or math.inf) for key in RESOURCES)
        for each in row["classes"]
    )


def spent(row: Row) -> dict[str, float]:
    """Of a method: mean peak of the devices that take part, in bytes, and what all sent and computed."""
    part = [each for each in row["classes"] if each["plan"]]
    devices = sum(each["devices"] for each in part)
    peak = sum(each["predicted"]["memory_bytes"] * each["devices"] for each in part) / max(1, devices)
    return {"memory_bytes": peak} | {key: row["totals"][key] for key in ("up_bytes", "down_bytes", "flops")}


def starred(row: Row) -> str:
    """The label of a method, marked where it leaves devices out."""
    return f"{row['label']}{'*' if row['took_part'] < 1 else ''}"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, accuracy) that no other beats in both, by rising cost."""
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not kept or points[i][1] > points[kept[-1]][1]:
            kept.append(i)
    return kept


def ranked(methods: Sequence[Row]) -> list[tuple[int, Row]]:
    """Methods that ran, each with its index in the file, the most accurate first."""
    done = [(i, row) for i, row in enumerate(methods) if row["seeds"]]
    return sorted(done, key=lambda each: -mean_accuracy(each[1])[0])


def ranking(methods: Sequence[Row]) -> Chart:
    """Accuracy of every method, the best first, with its spread over seeds; what did not run comes last."""
    done = ranked(methods)
    rest = [(i, row) for i, row in enumerate(methods) if not row["seeds"]]
    before = [row["accuracy"]["before"]["mean_over_devices"]["mean"] for _, row in done]
    edges = [edge for _, row in done for edge in marks.about(*mean_accuracy(row))]
    several = len({row["network"] for _, row in done}) > 1
    said = {index: _said(row, several) for index, row in done}
    left, right, wide = marks.between((row["label"] for row in methods), said.values())
    x = Scale(*marks.padded([*edges, *before]), left, right)
    bottom = TOP + ROW * (len(methods) - 1) + 22
    parts = [marks.axes(x, Scale(0, 1, TOP - 18, bottom), ACCURACY, None)]
    if len(set(before)) == 1:
        parts.append(marks.line([(x(before[0]), TOP - 18), (x(before[0]), bottom)], "dash"))
        parts.append(words(x(before[0]), TOP - 22, "before", "soft", "middle"))
    for n, (index, row) in enumerate([*done, *rest]):
        at = TOP + ROW * n
        parts.append(marks.name(left - 12, at + 4, row["label"], f"{colour(index)} own", "end"))
        if index in said:
            parts += [_placed(index, row, said[index], x, at), words(right + 16, at + 4, said[index])]
        else:
            parts.append(words(left, at + 4, _why_not(row), "soft"))
    title = "Which method is most accurate"
    note = "Mean over devices after the run; bars are one standard deviation over seeds."
    if any(over_budget(row) for _, row in done):
        note += f" {BEYOND}"
    return Chart("ranking", title, note, marks.drawing(wide, bottom + 44, title, *parts))


def _said(row: Row, several: bool) -> str:
    """What stands beside a method; its network too where there are several."""
    part = f"{1 - row['took_part']:.0%} left out" if row["took_part"] < 1 else ""
    over = "beyond the budgets" if over_budget(row) else ""
    return ", ".join(filter(None, (score(row), marks.short(row["network"]) if several else "", part, over)))


def _placed(index: int, row: Row, said: str, x: Scale, at: float) -> str:
    mean, std = mean_accuracy(row)
    bar = marks.line([(x(edge), at) for edge in marks.about(mean, std)], f"line {colour(index)}") if std else ""
    return bar + marks.point(x(mean), at, f"{row['label']}: {said}", index, hollow=over_budget(row))


def _why_not(row: Row) -> str:
    return "does not fit" if row["misfit"] else "not run"


def tradeoffs(methods: Sequence[Row]) -> list[Chart]:
    """Accuracy against memory, bytes sent and received, and operations, with the front of those within the budgets."""
    done = [(i, row) for i, row in enumerate(methods) if row["seeds"]]
    low, high = marks.padded([mean_accuracy(row)[0] for _, row in done])
    wide, bottom = _frame([starred(row) for _, row in done], TALL)
    y, made = Scale(low, high, bottom, TOP), []
    for key, across in SPENT.items():
        points = [(spent(row)[key], mean_accuracy(row)[0]) for _, row in done]
        x = Scale(0, 1.05 * max(cost for cost, _ in points) or 1, LEFT, WIDE - 14)
        parts = [marks.axes(x, y, across, ACCURACY)]
        kept = [n for n, (_, row) in enumerate(done) if not over_budget(row)]
        best = [kept[n] for n in front([points[n] for n in kept])]
        parts.append(tag("polyline", points=_steps([(x(points[n][0]), y(points[n][1])) for n in best]), class_="dash"))
        looks = [f"{colour(index)} {'own' if n in best else 'name'}" for n, (index, _) in enumerate(done)]
        ends = [(starred(row), look, x(a), y(b)) for (_, row), look, (a, b) in zip(done, looks, points, strict=True)]
        parts.append(marks.labels(ends, WIDE, TOP, bottom))
        for n, ((index, row), (cost, value)) in enumerate(zip(done, points, strict=True)):
            tip = f"{row['label']}: {value:.1%}, {across.text(cost)}{' (on the front)' if n in best else ''}"
            parts.append(marks.point(x(cost), y(value), tip, index, hollow=over_budget(row)))
        title = f"Accuracy against {across.name}"
        made.append(Chart(f"against-{key.split('_')[0]}", title, "", marks.drawing(wide, bottom + 42, title, *parts)))
    return made


def _frame(names: Sequence[str], tall: float) -> tuple[float, float]:
    """Width of a chart with names in a column at its right, and where its axis lies: below all of them."""
    return WIDE + max(marks.width(marks.short(each)) for each in names), TOP + max(tall, 14.0 * len(names))


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """A staircase: nothing up to a cost is better than the last step."""
    corners = [points[0]] if points else []
    for x, y in points[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in corners)


def fairness(methods: Sequence[Row]) -> Chart | None:
    """Classes x methods: accuracy after the run, one panel per class on the same axis, in the order of the ranking.

    As many panels are side by side as there is room for.
    None where there is one class: the ranking has said all.
    """
    done = ranked(methods)
    rows = [by_class(row) for _, row in done]
    values = [
        edge for row in rows for _, each, _ in row if each for edge in marks.about(each["mean"], each["std"] or 0)
    ]
    if not values:
        return None
    left, bounds, count = marks.room(row["label"] for _, row in done), marks.padded(values), len(rows[0])
    lines = math.ceil(count / max(1, int((marks.WIDE - left) / PANEL)))
    each = math.ceil(count / lines)  # about as many in every line
    tall, wide = 94.0 + 22 * len(done), (marks.WIDE - left) / each
    parts = []
    for number in range(count):
        top, start = tall * (number // each), left + wide * (number % each)
        if start == left:
            for n, (index, row) in enumerate(done):
                parts.append(marks.name(left - 12, top + 50 + 22 * n, row["label"], f"{colour(index)} own", "end"))
        x = Scale(*bounds, start + 6, start + wide - 18)
        parts.append(_panel(x, top, [(*ran, row[number]) for ran, row in zip(done, rows, strict=True)]))
    title = "Is it fair to every class"
    note = "Accuracy after the run on the devices of each class."
    if rows[0][-1][0] == WORST:
        note += " Worst off: the lowest of the classes, which may be another for each seed."
    if any(not trains for row in rows for _, _, trains in row):
        note += " A cross: the class takes no part in the training."
    if any(over_budget(row) for _, row in done):
        note += f" {BEYOND}"
    return Chart("fairness", title, note, marks.drawing(marks.WIDE, tall * lines, title, *parts))


def _panel(x: Scale, top: float, rows: Sequence[tuple[int, Row, tuple[str, Row | None, bool]]]) -> str:
    """Accuracy of every method on one class."""
    y = Scale(0, 1, top + 28, top + 42 + 22 * len(rows))
    parts = [marks.axes(x, y, ACCURACY, None)]
    parts.append(marks.name(x.start, top + 18, rows[0][2][0], most=x.end - x.start))
    for n, (index, row, (name, found, trains)) in enumerate(rows):
        if found:
            at, mean, std = top + 46 + 22 * n, found["mean"], found["std"] or 0.0
            parts.append(marks.line([(x(edge), at) for edge in marks.about(mean, std)], f"line {colour(index)}"))
            tip = f"{row['label']}, {name}: {mean:.1%} ± {std:.1%}" + ("" if trains else ", takes no part")
            over = over_budget(row)
            parts.append(
                marks.point(x(mean), at, tip, index, hollow=over) if trains else marks.cross(x(mean), at, tip, index)
            )
    return "".join(parts)


def learning(methods: Sequence[Row], runs: Curves, target: float | None = None) -> list[Chart]:
    """Accuracy over rounds, bytes sent, operations and virtual time: means over seeds, with bands of one deviation.

    A target is a dashed line. None where nothing was evaluated between the first round and the last: the ranking has
    said all.
    """
    found = {row["label"]: _means(runs[row["label"]]) for row in methods if runs.get(row["label"])}
    index = {row["label"]: i for i, row in enumerate(methods)}
    if not any(len(points) > 2 for points in found.values()):
        return []
    edges = [edge for points in found.values() for _, value, std in points for edge in marks.about(value, std)]
    wide, bottom = _frame(list(found), TALL + 60)
    y, made = Scale(*marks.padded([*edges, *([target] if target else [])]), bottom, TOP), []
    for key, across in COSTS.items():
        top = max(cost[key] for points in found.values() for cost, _, _ in points)
        if not top:
            continue
        x = Scale(0, top, LEFT, WIDE - 14)
        parts = [marks.axes(x, y, across, ACCURACY)]
        if target:
            parts.append(marks.line([(x.start, y(target)), (x(top), y(target))], "dash"))
        for label, points in found.items():
            at = [(x(cost[key]), y(value), *map(y, marks.about(value, std))) for cost, value, std in points]
            look = colour(index[label])
            parts.append(marks.band([(a, c) for a, _, c, _ in at], [(a, d) for a, _, _, d in at], f"band {look}"))
            parts.append(marks.line([(a, b) for a, b, _, _ in at], f"line {look}", label))
            for (cost, value, std), (a, b, *_) in zip(points, at, strict=True):
                tip = f"{label}: {value:.1%} ± {std:.1%}, {across.name} {across.text(cost[key])}"
                parts.append(marks.point(a, b, tip, index[label]))
        last = {label: points[-1] for label, points in found.items()}
        ends = [(k, f"{colour(index[k])} own", x(cost[key]), y(value)) for k, (cost, value, _) in last.items()]
        parts.append(marks.labels(ends, WIDE, TOP + 4, bottom))
        title = f"Accuracy over {across.name}"
        svg = marks.drawing(wide, bottom + 42, title, *parts)
        made.append(Chart(f"learning-{key.split('_')[0]}", title, "", svg))
    return made


def _means(runs: Sequence[tuple[Row, Sequence[Row]]]) -> list[tuple[dict[str, float], float, float]]:
    """Over seeds: costs, accuracy and its deviation at each round that every run evaluated."""
    curves = [progress(summary, rounds)["mean_over_devices"] for summary, rounds in runs]
    by_round = [{cost["round"]: (cost, value) for cost, value in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(each) for each in by_round)))
    made = []
    for number in shared:
        values = [each[number][1] for each in by_round]
        cost = {key: fmean(each[number][0][key] for each in by_round) for key in COSTS}
        made.append((cost, fmean(values), stdev(values) if len(values) > 1 else 0.0))
    return made


def of_comparison(collected: Row, runs: Curves) -> list[Chart]:
    """All charts that the data of a comparison allow, in reading order."""
    methods = collected["methods"]
    if not any(row["seeds"] for row in methods):
        return []
    fair = fairness(methods)
    return [
        ranking(methods),
        *tradeoffs(methods),
        *([fair] if fair else []),
        *learning(methods, runs, collected.get("target")),
    ]
