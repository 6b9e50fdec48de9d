"""Print what records/study says of some settings: accuracy of each method, and how far it is from CAFF, seed by seed.

python studies/table.py cifar10-half shakespeare-half
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RECORDS = Path(__file__).parent.parent / "records" / "study"


def accuracies(folder: Path, row: dict[str, Any]) -> dict[int, float]:
    """Seed -> mean over devices after the run, in %."""
    runs = (json.loads((folder / name / "summary.json").read_text(encoding="utf-8")) for name in row["runs"])
    scores = (100 * run["accuracy"]["after"]["mean_over_devices"] for run in runs)
    return dict(zip(row["seeds"], scores, strict=True))


def told(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):{sign}.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:{sign}.1f}"


def table(folder: Path) -> str:
    """The methods of a recorded setting, the best first, as Markdown."""
    rows = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["methods"]
    found = {row["label"]: accuracies(folder, row) for row in rows if row["seeds"]}
    ours = found.get("caff", {})
    head = "| method | network | trains | accuracy, % | against CAFF | peak, MiB | uplink, MiB | TFLOP |"
    lines = [f"### {folder.name}", "", head, "|---|---|---|---|---|---|---|---|"]
    for row in sorted((row for row in rows if row["seeds"]), key=lambda row: -mean(found[row["label"]].values())):
        mine = found[row["label"]]
        gaps = [mine[seed] - ours[seed] for seed in mine.keys() & ours.keys() if row["label"] != "caff"]
        peak = max(each["predicted"]["memory_bytes"] for each in row["classes"] if each["plan"]) / 2**20
        plans = "; ".join(each["plan"] or "nothing" for each in row["classes"])
        sent, work = row["totals"]["up_bytes"] / 2**20, row["totals"]["flops"] / 1e12
        cells = (
            row["label"],
            row["network"],
            plans,
            told([*mine.values()]),
            told(gaps, "+") if gaps else "",
            f"{peak:.1f}",
            f"{sent:.1f}",
            f"{work:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for words, rest in (("Have no plan", True), ("Not run", False)):
        names = [row["label"] for row in rows if not row["seeds"] and bool(row["misfit"]) is rest]
        lines += ["", f"{words}: {'; '.join(names)}."] if names else []
    return "\n".join(lines)


def main() -> None:
    """A table of each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="TASK-SETTING")
    for setting in parser.parse_args().settings:
        print(f"\n{table(RECORDS / setting)}")


if __name__ == "__main__":
    main()
