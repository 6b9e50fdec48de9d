"""The answer first: in a sentence or two, what fits, what it gained, at what cost, and who was left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lamina.fleet import RESOURCES
from lamina.report.charts import Tally
from lamina.report.contrast import mean_accuracy, over_budget, score
from lamina.table import Table
from lamina.tables import percent
from lamina.units import duration, human

Row = Mapping[str, Any]
_MOST = 4
"""Names in one list of a sentence."""


def of_run(summary: Row) -> str:
    """What a run came to."""
    classes, totals = summary["classes"], summary["totals"]
    fits = [row for row in classes if row["plan"]]
    out = sum(row["sat_out"] for row in classes)
    devices = sum(row["devices"] for row in classes)
    before, after = (summary["accuracy"][when]["mean_over_devices"] for when in ("before", "after"))
    took = f", {duration(totals['clock_seconds'])} of virtual time" if totals.get("clock_seconds") else ""
    left = f"{out} of {_count(devices, 'device')} sat out" if out else "no device was left out"
    return (
        f"{summary['method']} on {summary['network']['chosen']} fits {len(fits)} of "
        f"{_count(len(classes), 'device class')}. "
        f"Accuracy went from {before:.1%} to {after:.1%} ({100 * (after - before):+.1f} points, mean over devices) in "
        f"{_count(totals['rounds'], 'round')}, for {human('bytes', totals['up_bytes'])} sent and "
        f"{human('flops', totals['flops'])} computed by the devices{took}; {left}."
    )


def of_comparison(collected: Row) -> str:
    """Who won within the budgets, who is level, who left devices out, and who could not run."""
    done = sorted((row for row in collected["methods"] if row["seeds"]), key=lambda row: -mean_accuracy(row)[0])
    fair = [row for row in done if not over_budget(row)]
    if not fair:
        return "No method has run within the budgets."
    best, seeds = fair[0], len(fair[0]["seeds"])
    mean, std = mean_accuracy(best)
    level = [row for row in fair[1:] if mean - mean_accuracy(row)[0] <= max(std, mean_accuracy(row)[1])]
    said = [
        f"{best['label']}{_alone(best)} is the most accurate within the budgets: {score(best)}, from "
        f"{best['accuracy']['before']['mean_over_devices']['mean']:.1%} before"
        + (
            f" (mean ± standard deviation over {seeds} seeds)."
            if seeds > 1
            else " (one seed: differences may be chance)."
        )
    ]
    whole = [row for row in fair if row["took_part"] == 1]
    if best["took_part"] < 1 and whole:
        said.append(f"Of those that leave no device out, {whole[0]['label']} is: {score(whole[0])}.")
    if level:
        said.append(f"Level with it, within the larger standard deviation of the two: {_names(level)}.")
    if known := [row for row in fair if row.get("worst_class")]:
        fairest = max(known, key=lambda row: row["worst_class"]["mean"])
        beside = f" ({best['label']}: {percent(best['worst_class'])}%)" if fairest is not best else ""
        said.append(
            "The class that is worst off has most with "
            f"{_names([fairest])}: {percent(fairest['worst_class'])}%{beside}."
        )
    if free := [row for row in done if over_budget(row)]:
        scores = (f"{row['label']} {score(row)}" for row in free)
        said.append(f"Beyond the budgets: {_listed(scores)}.")
    if partial := [row for row in fair[1:] if row["took_part"] < 1]:
        parts = (f"{row['label']} ({1 - row['took_part']:.0%})" for row in partial)
        said.append(f"Leave devices out: {_listed(parts)}.")
    if misfits := [row for row in collected["methods"] if row.get("misfit")]:
        said.append(f"Have no plan within the budgets: {_names(misfits)}.")
    return " ".join(said)


def setting(collected: Row) -> str:
    """What devices there were, with which budgets, for how long."""
    row = next((row for row in collected["methods"] if row["seeds"]), None)
    if row is None:
        return ""
    fleet = []
    for each in row["classes"]:
        budget = each["budget"]
        limits = [f"{name} {human(key, budget[key])}" for key, name in RESOURCES.items() if budget[key]]
        limits[:1] = (
            [f"{limits[0]} to {human('bytes', best)}"] if (best := each.get("best_memory_bytes")) else limits[:1]
        )
        said = f"{', '.join(limits)} each" if limits else "no budget"
        fleet.append(f"{_count(each['devices'], 'device')} of class {each['name']} ({said})")
    return f"{', '.join(fleet)}; {_count(round(row['totals']['rounds']), 'round')}."


def _alone(row: Row) -> str:
    return f", though it leaves out {1 - row['took_part']:.0%} of the devices," if row["took_part"] < 1 else ""


def _names(rows: Iterable[Row]) -> str:
    return _listed(f'"{row["label"]}"' if "," in row["label"] else row["label"] for row in rows)


def _listed(given: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    said = list(given)
    return ", ".join(said if len(said) <= _MOST + 1 else [*said[:_MOST], f"and {len(said) - _MOST} more"])


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + (("es" if name.endswith("s") else "s") if number != 1 else "")


def left_out(summary: Row, tally: Tally) -> Table | None:
    """Which classes sat out and what they lack for the cheapest plan; which updates did not count, and why."""
    rows = [
        (
            row["name"],
            _count(row["sat_out"], "device"),
            f"the cheapest plan needs more than the budget: {_lacking(row)}",
        )
        for row in summary["classes"]
        if row["sat_out"]
    ]
    reasons = Counter[tuple[str, str]]()
    for (_, name, _, rejected), count in tally.items():
        if rejected:
            reasons[name, rejected] += count
    rows += [(name, _count(count, "update"), f"not counted: {why}") for (name, why), count in sorted(reasons.items())]
    return Table("Who was left out, and why", ("class", "how many", "why"), rows, left=3) if rows else None


def misfits(collected: Row) -> Table | None:
    """Methods that cannot run on the fleet, and classes that a method leaves out."""
    rows = []
    for row in collected["methods"]:
        if row.get("misfit"):
            rows.append((row["label"], "all", row["misfit"]))
        out = (each for each in row.get("classes", ()) if each["plan"] is None)
        rows += [(row["label"], each["name"], f"the cheapest plan needs {_lacking(each)}") for each in out]
    return Table("What does not fit, and why", ("method", "class", "why"), rows, left=3) if rows else None


def _lacking(row: Row) -> str:
    """What a price has more of than the budget: "memory 22.3 / 6.1 MiB"."""
    used, limits = row["predicted"], row["budget"]
    over = (key for key in RESOURCES if used[key] > (limits[key] or math.inf))
    return ", ".join(f"{RESOURCES[key]} {human(key, used[key], limits[key])}" for key in over)
