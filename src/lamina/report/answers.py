"""The answer first: in a sentence or two, what fits, what it gained, at what cost, and who was left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from lamina.fleet import RESOURCES
from lamina.methods import METHODS
from lamina.methods.about import written
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
    counted = _counted(totals)
    left = (
        f"{out} of {_count(devices, 'device')} sat out" if out else f"no device {'sat' if counted else 'was left'} out"
    )
    return (
        f"{summary['method']} on {summary['network']['chosen']} fits {len(fits)} of "
        f"{_count(len(classes), 'device class')}. "
        f"Accuracy went from {before:.1%} to {after:.1%} ({100 * (after - before):+z.1f} points, mean over devices) in "
        f"{_count(totals['rounds'], 'round')}, for {human('bytes', totals['up_bytes'])} sent and "
        f"{human('flops', totals['flops'])} computed by the devices{took}; {'; '.join(filter(None, (left, counted)))}."
    )


def of_comparison(collected: Row) -> list[str]:
    """Who won within the budgets and who is level; then at what cost, who left devices out, and who could not run."""
    done = sorted((row for row in collected["methods"] if row["seeds"]), key=lambda row: -mean_accuracy(row)[0])
    fair = [row for row in done if not over_budget(row)]
    if not fair:
        return ["No method has run within the budgets."]
    best, seeds = fair[0], len(fair[0]["seeds"])
    told = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed: differences may be chance"
    before = best["accuracy"]["before"]["mean_over_devices"]["mean"]
    first = (
        f"{_names([best])} on {best['network']}{_alone(best)} is the most accurate within the budgets: {score(best)}, "
        f"from {before:.1%} before ({told})."
    )
    said = [" ".join([first, *_others(fair, _after)]), _cost(best)]
    whole = [row for row in fair if row["took_part"] == 1]
    if best["took_part"] < 1 and whole:
        said[0] += f" Of those that leave no device out, {_names(whole[:1])} has most: {score(whole[0])}."
    if known := [row for row in fair if row.get("worst_class")]:
        known.sort(key=lambda row: -row["worst_class"]["mean"])
        most = f"{_names(known[:1])}: {percent(known[0]['worst_class'])}%."
        rest = _others(known, lambda row: row["worst_class"])
        said.append(" ".join([f"The class that is worst off has most with {most}", *rest]))
    if free := [row for row in done if over_budget(row)]:
        scores = (f"{_names([row])} {score(row)}" for row in free)
        said.append(f"Beyond the budgets: {_listed(scores)}.")
    if partial := [row for row in fair[1:] if row["took_part"] < 1]:
        parts = (f"{_names([row])} ({1 - row['took_part']:.0%})" for row in partial)
        said.append(f"Leave devices out: {_listed(parts)}.")
    if lost := [f"{_names([row])} ({counted})" for row in done if (counted := _counted(row["totals"]))]:
        said.append(f"Not every update was used: {_listed(lost)}.")
    if misfits := [row for row in collected["methods"] if row.get("misfit")]:
        said.append(f"Have no plan within the budgets: {_names(misfits)}.")
    return said


def _counted(totals: Row) -> str:
    """How many of the updates were used, and how many rounds were abandoned; empty where all went well."""
    rejected, abandoned = totals.get("rejected_updates", 0), totals.get("abandoned_rounds", 0)
    if not rejected and not abandoned:
        return ""
    rounds = f", {_number(abandoned)} of {_count(totals['rounds'], 'round')} abandoned" if abandoned else ""
    used = totals["updates"]
    return f"{_number(used)} of {_count(used + rejected, 'update')} counted{rounds}"


def _cost(row: Row) -> str:
    peak = max(each["predicted"]["memory_bytes"] for each in row["classes"] if each["plan"])
    up, down, flops = (human(key, row["totals"][key]) for key in ("up_bytes", "down_bytes", "flops"))
    return (
        f"A device needs up to {human('memory_bytes', peak)} for it; in all, devices send {up}, receive {down} and "
        f"compute {flops}."
    )


def _after(row: Row) -> Row:
    found: Row = row["accuracy"]["after"]["mean_over_devices"]
    return found


def _others(rows: Sequence[Row], found: Callable[[Row], Row]) -> Iterator[str]:
    """Who is level with the first of `rows`, and who is the next: by differences on the seeds that both have.

    The rule goes by the numbers as they are shown; with one seed it is level that shows no difference.
    """
    first, *rest = rows
    gaps = [(row, gap) for row in rest if (gap := _gap(row, first, found))]
    told: dict[bool, list[str]] = {True: [], False: []}  # by whether it is level
    for row, gap in gaps:
        mean, std = (round(100 * value, 1) for value in (fmean(gap), stdev(gap) if len(gap) > 1 else 0.0))
        level = -mean <= std
        told[level].append(f"{_names([row])} ({_points(gap)}{'' if level else ' points'})")
    if told[True]:
        several = any(len(gap) > 1 for _, gap in gaps)
        within = ", within a standard deviation of the differences over seeds" if several else ""
        yield f"Level with that{within}: {_listed(told[True])}."
    if told[False]:
        yield f"{'Behind' if told[True] else 'Next'}: {told[False][0]}."


def _gap(row: Row, other: Row, found: Callable[[Row], Row]) -> list[float]:
    """Accuracy of `row` less that of `other`, on each seed that both have; none where an older file has but means."""
    if not all("values" in found(each) for each in (row, other)):
        return []
    mine, its = (dict(zip(each["seeds"], found(each)["values"], strict=True)) for each in (row, other))
    return [mine[seed] - its[seed] for seed in mine if seed in its]


def _points(gap: Sequence[float]) -> str:
    return percent({"mean": fmean(gap), "std": stdev(gap) if len(gap) > 1 else None}, "+")


def setting(collected: Row) -> list[str]:
    """What devices there were, with which budgets; what was learned by whom, for how long."""
    row = next((row for row in collected["methods"] if row["seeds"]), None)
    if row is None:
        return []
    alike, fleet = collected.get("settings", {}), []
    for each in row["classes"]:
        budget = each["budget"]
        limits = [f"{name} {human(key, budget[key])}" for key, name in RESOURCES.items() if budget[key]]
        limits[:1] = (
            [f"{limits[0]} to {human('bytes', best)}"] if (best := each.get("best_memory_bytes")) else limits[:1]
        )
        said = f"{', '.join(limits)} each" if limits else "no budget"
        fleet.append(f"{_count(each['devices'], 'device')} of class {each['name']} ({said})")
    told = {"task": "task.name", "split": "task.split", "devices in a round": "cohort", "local steps": "local.steps"}
    told |= {
        "batches of": "local.batch_size",
        "optimizer": "local.optimizer",
        "lr": "local.lr",
    }
    shared = [f"{name} {alike[key]}" for name, key in told.items() if alike.get(key)]
    if "eval_devices" in alike:
        some = alike["eval_devices"]
        shared.append(f"tested on {_count(some, 'device') if some else 'all devices that have test examples'}")
    return [f"{', '.join(fleet)}.", f"{', '.join([_count(round(row['totals']['rounds']), 'round'), *shared])}."]


def _alone(row: Row) -> str:
    return f", though it leaves out {1 - row['took_part']:.0%} of the devices," if row["took_part"] < 1 else ""


def _names(rows: Iterable[Row]) -> str:
    return _listed(f'"{row["label"]}"' if "," in row["label"] else row["label"] for row in rows)


def _listed(given: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    said = list(given)
    return ", ".join(said if len(said) <= _MOST + 1 else [*said[:_MOST], f"and {len(said) - _MOST} more"])


def _number(value: float) -> str:
    """A count, or a mean of counts."""
    return f"{round(value, 1):,}".removesuffix(".0")


def _count(number: float, name: str) -> str:
    return f"{_number(number)} {name}" + (("es" if name.endswith("s") else "s") if number != 1 else "")


def left_out(summary: Row, tally: Tally) -> Table | None:
    """Which classes sat out and what they lack for the cheapest plan; which updates did not count, and why.

    The reasons are those of the tally; where it lacks some, as without devices.jsonl, the totals say how many.
    """
    rows = [
        (
            row["name"],
            _count(row["sat_out"], "device"),
            f"the cheapest plan needs {_lacking(row)}",
        )
        for row in summary["classes"]
        if row["sat_out"]
    ]
    reasons = Counter[tuple[str, str]]()
    for (_, name, _, rejected), count in tally.items():
        if rejected:
            reasons[name, rejected] += count
    rows += [(name, _count(count, "update"), f"not counted: {why}") for (name, why), count in sorted(reasons.items())]
    if (unknown := summary["totals"].get("rejected_updates", 0) - reasons.total()) > 0:
        rows.append(("of any class", _count(unknown, "update"), "not counted: the reasons are not recorded here"))
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
    """What a price has more of than the budget: "22.3 MiB of memory (there are 6.1 MiB)"."""
    used, limits = row["predicted"], row["budget"]
    over = (key for key in RESOURCES if used[key] > (limits[key] or math.inf))
    needs = (
        f"{human(key, used[key], up=True)} of {RESOURCES[key]} (there are {human(key, limits[key])})" for key in over
    )
    return ", ".join(needs)


def differences(collected: Row) -> Table | None:
    """What each method is, and what is set for it that is not for all; None for an older file, which does not say."""
    if "settings" not in collected:
        return None
    rows = []
    for row in collected["methods"]:
        own = dict(row["settings"])
        name = own.pop("method.name", collected["settings"].get("method.name", ""))
        about = (METHODS[name].cuts, METHODS[name].source) if name in METHODS else ("", "")
        keys = sorted(own, key=lambda key: key.startswith("method."))
        said = (f"{key.removeprefix('method.')} = {written(own[key])}" for key in keys)
        rows.append((row["label"], *about, ", ".join(said)))
    return Table("What each method is", ("method", "cuts", "source", "set for it alone"), rows, left=4)
