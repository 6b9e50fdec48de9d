"""Write what records/study says of every setting: accuracy of each method, and how far it is from CAFF, seed by seed.

python studies/table.py docs/study-tables.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lamina import files, tables

RECORDS = Path(__file__).parent.parent / "records" / "study"
MIB, TERA = 2**20, 1e12
Runs = dict[int, dict[str, Any]]  # by seed
HEAD = """# Study: all tables

Made by `python studies/table.py docs/study-tables.md` from [records/study](../records/study); what they say is in
[the study](study.md). Accuracies are means over devices, then means ± standard deviations over seeds where there are
several; "against CAFF" is the difference seed by seed. Uplink and operations are those of all devices in all rounds,
the peak is that of the class with the most. Of fleets with several classes, accuracy is told for each, in brackets
where the class takes no part, and for the class that is worst off, seed by seed. In tunings, it is on examples held
back from training.
"""


def summaries(folder: Path, row: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Seed -> what the run came to."""
    runs = (json.loads((folder / name / "summary.json").read_text(encoding="utf-8")) for name in row["runs"])
    return dict(zip(row["seeds"], runs, strict=True))


def accuracy(found: dict[str, Any]) -> float:
    """Of a run or of a class: mean over devices after the run, in %."""
    after: float = found["accuracy"]["after"]["mean_over_devices"]
    return 100 * after


def told(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):{sign}.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:{sign}.1f}"


def by_class(row: dict[str, Any]) -> Iterator[str]:
    """Accuracy of each class, in brackets where it takes no part, and of the one that is worst off."""
    for _, found, trains in tables.by_class(row):
        text = tables.percent(found).replace("±", " ± ") if found else ""
        yield text if trains or not found else f"({text})"


def cells(row: dict[str, Any], runs: Runs, our_runs: Runs, target: float | None) -> Iterator[str]:
    """A line of a table."""
    classes, totals = row["classes"], row["totals"]
    mine, ours = ({seed: accuracy(run) for seed, run in each.items()} for each in (runs, our_runs))
    gaps = [mine[seed] - ours[seed] for seed in mine.keys() & ours.keys() if row["label"] != "caff"]
    peak = max(each["predicted"]["memory_bytes"] for each in classes if each["plan"]) / MIB
    yield from (row["label"], row["network"], "; ".join(each["plan"] or "nothing" for each in classes))
    yield from (told([*mine.values()]), told(gaps, "+") if gaps else "")
    yield from by_class(row)
    yield from (f"{peak:.1f}", f"{totals['up_bytes'] / MIB:.1f}", f"{totals['flops'] / TERA:.1f}")
    if target:
        spent = row["to_target"]
        reached = spent["seeds"] if spent else []
        yield f"{len(reached)} of {len(mine)}"
        yield from (
            (f"{spent['round']:.0f}", f"{spent['up_bytes'] / MIB:.0f}", f"{spent['flops'] / TERA:.1f}")
            if spent
            else ("", "", "")
        )


def table(folder: Path) -> str:
    """The methods of a recorded setting, the best first, as Markdown."""
    collected = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    rows, target = collected["methods"], collected.get("target")
    found = {row["label"]: summaries(folder, row) for row in rows if row["seeds"]}
    done = sorted(
        (row for row in rows if row["seeds"]), key=lambda row: -mean(map(accuracy, found[row["label"]].values()))
    )
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


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    files.write(parser.parse_args().out, page())


if __name__ == "__main__":
    main()
