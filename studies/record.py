"""Copy what settings of the study came to into records/study, without states and networks, and with relative paths.

python studies/record.py runs/study cifar10-half cifar10-one
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from lamina import compare, files, report

RECORDS = Path(__file__).parent.parent / "records" / "study"
OF_RUN = ("config.toml", "env.json", "rounds.jsonl", "summary.json")


def bare(path: Path, roots: Iterable[Path]) -> str:
    """A file without the folders of the machine it was written on."""
    said = path.read_text(encoding="utf-8")
    for root in roots:
        said = said.replace(f"{root}/", "")
    return said


def main() -> None:
    """One folder per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that studies/run.py wrote to")
    parser.add_argument("settings", nargs="+", help="TASK-SETTING")
    given = parser.parse_args()
    roots = (given.runs.absolute().parent.parent, Path.cwd())  # of the runs, and, where it is called there, of the data
    for setting in given.settings:
        into = RECORDS / setting
        for old in into.glob("*/"):
            shutil.rmtree(old)
        collected = json.loads(bare(given.runs / setting / "compare.json", roots))
        copied = [(given.runs / f"{setting}.toml", into / "study.toml")]
        for run in (run for row in collected["methods"] for run in row.get("runs", ())):
            copied += [(given.runs / setting / run / name, into / run / name) for name in OF_RUN]
        for source, target in copied:
            target.parent.mkdir(parents=True, exist_ok=True)
            files.write(target, bare(source, roots))
        compare.save(into, collected)
        report.figures(report.read(into), into / "figures")
        print(into)


if __name__ == "__main__":
    main()
