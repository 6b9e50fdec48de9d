"""Measure the peak memory of what one seed of a recorded setting trained, method by method, beside its budget.

python studies/measure.py cifar10-half          # from the folder in which data/cifar10 is
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lamina import files

RECORDS = Path(__file__).parent.parent / "records" / "study"


def main() -> None:
    """Write measured.json beside the records of each setting; exit with 1 if a budget is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="TASK-SETTING")
    broken = []
    for setting in parser.parse_args().settings:
        folder, found = RECORDS / setting, []
        for row in json.loads((folder / "compare.json").read_text(encoding="utf-8"))["methods"]:
            if not row["seeds"] or row["label"] == "fedavg, no budgets":
                continue
            command = ["lamina", "plan", folder / row["runs"][0] / "config.toml", "--measure", "--json"]
            told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for each in told["classes"]:
                if not each["measured"]:
                    continue
                numbers = {
                    "predicted_bytes": each["predicted"]["memory_bytes"],
                    "measured_bytes": each["measured"]["peak_bytes"],
                    "budget_bytes": each["budget"]["memory_bytes"],
                }
                found.append({"method": row["label"], "class": each["name"]} | numbers)
                if numbers["measured_bytes"] > numbers["budget_bytes"]:
                    broken.append(f"{setting}: {row['label']}, {each['name']}")
        files.write_json(folder / "measured.json", found)
        off = max(abs(each["measured_bytes"] / each["predicted_bytes"] - 1) for each in found)
        print(f"{setting}: {len(found)} plans measured, predicted to {off:.1e}", flush=True)
    if broken:
        sys.exit("over budget: " + "; ".join(broken))


if __name__ == "__main__":
    main()
