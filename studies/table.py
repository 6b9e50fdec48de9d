"""Write what records/study says: tables of every setting, and a picture of how far each method is from CAFF.

python studies/table.py docs          # writes docs/study-tables.md and docs/study.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lamina import files, tables
from lamina.report import marks
from lamina.report.marks import Chart

RECORDS = Path(__file__).parent.parent / "records" / "study"
MIB, TERA = 2**20, 1e12
Runs = dict[int, float]  # by seed
TASKS = {"shakespeare": "Shakespeare", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
SETTINGS = (
    *(
        "half",
        "half-tuned",
        "head",
        "one",
        "six",
        "nine",
        "half-deep",
        "one-deep",
        "one-head",
        "exact",
        "exact-head",
        "uplink",
        "compute",
    ),
    *("three-classes", "three-classes-iid", "eighths", "eighths-exact", "robust"),
)
BESIDE = {"half": "fjord"}
"""Settings whose methods stand in the column of another, which has the same budgets and seeds."""
ROWS = (
    *("caff", "caff, 12 blocks", "cocofl", "lora-last-t", "lora-last-t, 12 blocks", "lora", "hetlora", "adapters"),
    *("fedra", "fedavg", "slt", "progfed", "depthfl", "fedhm", "federated-dropout", "fedrolex", "heterofl", "fjord"),
)
NOTES = (
    "Points of accuracy ahead of (blue) or behind (orange) CAFF, whose own line is its accuracy. Every method takes",
    "the network of which it can train most blocks (half deep, one deep, one head: the deepest that fits). Bold: by",
    "more than a standard deviation of the differences over seeds, of which there is none with one seed.",
    "*: leaves devices out. Nothing: not run.",
)
WIDE, HIGH, LEFT, TOP = 62.0, 22.0, 175.0, 52.0
HEAD = """# Study: all tables

Made by `python studies/table.py docs` from [records/study](../records/study); what they say is in
[the study](study.md). Accuracies are means over devices, then means ± standard deviations over seeds where there are
several; "against CAFF" is the difference seed by seed. Uplink and operations are those of all devices in all rounds,
the peak is that of the class with the most. Of fleets with several classes, accuracy is told for each, in brackets
where the class takes no part, and for the class that is worst off, seed by seed. In tunings, it is on examples held
back from training.
"""


def accuracies(row: dict[str, Any]) -> Runs:
    """Seed -> accuracy after the run, mean over devices, in %."""
    values = row["accuracy"]["after"]["mean_over_devices"]["values"]
    return {seed: 100 * value for seed, value in zip(row["seeds"], values, strict=True)}


def told(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):{sign}.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:{sign}.1f}"


def by_class(row: dict[str, Any]) -> Iterator[str]:
    """Accuracy of each class, in brackets where it takes no part, and of the one that is worst off."""
    for _, found, trains in tables.by_class(row):
        text = tables.percent(found).replace("±", " ± ") if found else ""
        yield text if trains or not found else f"({text})"


def gaps(runs: Runs, our_runs: Runs) -> list[float]:
    """Points that a method is ahead of CAFF, seed by seed."""
    return [value - our_runs[seed] for seed, value in runs.items() if seed in our_runs]


def cells(row: dict[str, Any], runs: Runs, our_runs: Runs, target: float | None) -> Iterator[str]:
    """A line of a table."""
    classes, totals = row["classes"], row["totals"]
    found = gaps(runs, our_runs) if row["label"] != "caff" else []
    peak = max(each["predicted"]["memory_bytes"] for each in classes if each["plan"]) / MIB
    yield from (row["label"], row["network"], "; ".join(each["plan"] or "nothing" for each in classes))
    yield from (told([*runs.values()]), told(found, "+") if found else "")
    yield from by_class(row)
    yield from (f"{peak:.1f}", f"{totals['up_bytes'] / MIB:.1f}", f"{totals['flops'] / TERA:.1f}")
    if target:
        spent = row["to_target"]
        reached = spent["seeds"] if spent else []
        yield f"{len(reached)} of {len(runs)}"
        yield from (
            (f"{spent['round']:.0f}", f"{spent['up_bytes'] / MIB:.0f}", f"{spent['flops'] / TERA:.1f}")
            if spent
            else ("", "", "")
        )


def table(folder: Path) -> str:
    """The methods of a recorded setting, the best first, as Markdown."""
    collected = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    rows, target = collected["methods"], collected.get("target")
    found = {row["label"]: accuracies(row) for row in rows if row["seeds"]}
    done = sorted((row for row in rows if row["seeds"]), key=lambda row: -mean(found[row["label"]].values()))
    names = [name for name, *_ in tables.by_class(done[0])]
    head = ["method", "network", "trains", "accuracy, %", "against CAFF", *names, "peak, MiB", "uplink, MiB", "TFLOP"]
    head += [f"reach {target:.0%}", "round", "MiB till then", "TFLOP till then"] if target else []
    lines = [f"### {folder.name}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in done:
        lines.append(f"| {' | '.join(cells(row, found[row['label']], found.get('caff', {}), target))} |")
    for words, rest in (("Have no plan", True), ("Not run", False)):
        left = [row["label"] for row in rows if not row["seeds"] and bool(row["misfit"]) is rest]
        lines += ["", f"{words}: {'; '.join(left)}."] if left else []
    return "\n".join(lines)


def page() -> str:
    """A table of each setting, by task."""
    folders = sorted(file.parent for file in RECORDS.glob("*/compare.json"))
    return "\n\n".join([HEAD.rstrip(), *map(table, folders)]) + "\n"


def cell(rows: dict[str, Any], name: str, x: float, y: float) -> str:
    """A box for a method in a setting: how far it is from CAFF, or that it has no plan; nothing if it was not run."""
    called = [rows[label] for label in (name, f"{name}, restricted", f"{name}, drop") if label in rows]
    row = next((each for each in called if each["seeds"]), None)
    if row is None:
        misfit = any(each["misfit"] for each in called)
        return marks.words(x + WIDE / 2, y + 15, "no plan", "soft", "middle") if misfit else ""
    runs = accuracies(row)
    found, mine = gaps(runs, accuracies(rows["caff"])), told([*runs.values()])
    tip = f"{row['label']}, {row['folder'].name}: {mine} %, {told(found, '+')} from CAFF"
    star = "*" if row["took_part"] < 1 else ""
    if row is rows["caff"]:
        return marks.words(x + WIDE / 2, y + 15, f"{mine.split(' ')[0]} %{star}", "", "middle")
    gap = round(mean(found), 1)
    clear = gap and len(found) > 1 and abs(mean(found)) > stdev(found)
    said = f"{gap:+.1f}".replace("-", "\u2212") if gap else "0.0"
    look = {"class_": f"{marks.colour(0 if gap > 0 else 1)} fill", "fill_opacity": 0.6 * min(1, abs(gap) / 10) ** 0.5}
    box = marks.tag("rect", x=x + 1, y=y + 1, width=WIDE - 2, height=HIGH - 2, tip=tip, **look)
    return box + marks.words(x + WIDE / 2, y + 15, said + star, "own" if clear else "", "middle")


def methods_of(folder: Path) -> dict[str, Any]:
    """Label -> row of a comparison and its folder, none if it is not recorded."""
    file = folder / "compare.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["methods"] if file.exists() else []
    return {row["label"]: row | {"folder": folder} for row in rows}


def block(task: str, y: float) -> tuple[list[str], float, float]:
    """Methods x settings of a task from height `y` on; how wide and high that is."""
    columns = {}
    for setting in SETTINGS:
        beside = methods_of(RECORDS / f"{task}-{BESIDE[setting]}") if setting in BESIDE else {}
        if rows := methods_of(RECORDS / f"{task}-{setting}"):
            columns[setting] = beside | rows
    called = {label.split(", ")[0] for rows in columns.values() for label in rows}
    names = [name for name in ROWS if name.split(", ")[0] in called]
    parts = [marks.words(LEFT - 8, y + 16, TASKS[task], "own", "end")]
    for k, name in enumerate(names):
        parts.append(marks.words(LEFT - 8, y + TOP + k * HIGH + 15, name, "own" if name == "caff" else "", "end"))
    for n, (setting, rows) in enumerate(columns.items()):
        x = LEFT + n * WIDE
        words = setting.replace("three-classes", "three classes").replace("-", " ").split(" ")
        for line, word in enumerate(words):
            parts.append(marks.words(x + WIDE / 2, y + 16 + 14 * (line + 3 - len(words)), word, "soft", "middle"))
        for k, name in enumerate(names):
            parts.append(cell(rows, name, x, y + TOP + k * HIGH))
    return parts, LEFT + WIDE * len(columns), TOP + HIGH * len(names)


def overview() -> str:
    """Methods x settings: points ahead of or behind CAFF by the rule of the paper."""
    parts, width, y = [], 0.0, 0.0
    for task in TASKS:
        drawn, wide, high = block(task, y)
        parts += drawn
        width, y = max(width, wide), y + high + 16
    for k, line in enumerate(NOTES):
        parts.append(marks.words(8, y + 16 + 16 * k, line, "soft"))
    title = "How far each method is from CAFF"
    return Chart("study", title, "", marks.drawing(width + 8, y + 16 + 16 * len(NOTES), title, *parts)).file()


def main() -> None:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the pages")
    folder = parser.parse_args().folder
    files.write(folder / "study-tables.md", page())
    files.write(folder / "study.svg", overview())


if __name__ == "__main__":
    main()
