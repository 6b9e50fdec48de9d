"""Methods x seeds under one ruler: every cell is a run of its own, in a folder of its own, and is done once.

    <out>/<name>/<label>-<seed>-<digest>/   a run folder; the digest is of its settings
    <out>/<name>/compare.json, compare.md, report.html   the table, and the page, of all cells done so far

The same command goes on where it was stopped, within a cell too. A method that is added to the file adds its cells.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lamina import files, report, tables, toml
from lamina.config import Comparison, Experiment
from lamina.errors import DoesNotFitError, UserError
from lamina.experiment import check_task
from lamina.report import charts
from lamina.run import Run, take_up

SCHEMA = "lamina.compare/1"
_ASIDE = ("name", "seed", "workers", "track")
"""Settings that are of a run, or change no result."""
_OF_CLASS = ("name", "devices", "plan", "levers", "trained_blocks", "predicted", "budget", "best_memory_bytes")


@dataclass(frozen=True)
class Cell:
    """One method with one seed.

    Attributes:
        label: Of the method.
        experiment: To run.
        folder: Of the run.
    """

    label: str
    experiment: Experiment
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """Its summary; None where it is not done."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def reached(self, target: float) -> dict[str, float] | None:
        """What it had spent when accuracy was first that high, at the end of a round; None where it never was."""
        found = charts.progress(self.result() or {}, self.rounds())["mean_over_devices"]
        return next((spent for spent, accuracy in found if accuracy >= target), None)

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl.

        Raises:
            ValueError: They are not those of all rounds.
        """
        lines = (self.folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        if [row["round"] for row in found] != list(range(1, self.experiment.rounds + 1)):
            raise ValueError(f"not the {self.experiment.rounds} rounds of the run")
        return found

    def check(self, target: float | None) -> None:
        """Refuse a finished run that is not whole.

        Args:
            target: Of the comparison; with one, the rounds must be there too.

        Raises:
            UserError: Naming the file, and what to do.
        """
        path = self.folder / "summary.json"
        if not path.exists():
            return
        try:
            result: Any = self.result()
            _row({self.experiment.seed: result})
            path = self.folder / "rounds.jsonl"
            if target or path.exists():
                self.reached(target or math.inf)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
            reason = f"{type(error).__name__} {error}"
            raise UserError(f"{path} is damaged: {reason}; delete {self.folder} to run it again") from error


def cells(comparison: Comparison, out: Path) -> Iterator[Cell]:
    """All of them, seed by seed, so that the first table is complete early."""
    for seed in comparison.seeds:
        for label, experiment in comparison.experiments:
            made = replace(experiment, seed=seed)
            digest = files.digest(toml.dump(replace(made, workers=0, track=()).to_table()).encode())[:8]
            short = re.sub(r"[^\w.]+", "-", label).strip("-")
            name = f"{short}-{seed}".encode()[: files.NAME_BYTES].decode(errors="ignore")
            yield Cell(label, made, out / comparison.name / f"{name}-{digest}")


def check(comparison: Comparison, found: Sequence[Cell]) -> None:
    """Refuse, before anything is trained or written, what would stop a comparison on its way.

    Raises:
        UserError: A method or a network is not for the task, or a finished cell is damaged.
    """
    for label, experiment in comparison.experiments:
        try:
            check_task(experiment)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
    for cell in found:
        cell.check(comparison.target)


def collect(comparison: Comparison, found: Sequence[Cell], misfits: Mapping[str, str]) -> dict[str, Any]:
    """What compare.json holds; documented in docs/json.md.

    Args:
        comparison: What is compared.
        found: All cells.
        misfits: Label -> why the method cannot run on this fleet at all.
    """
    rows: list[dict[str, Any]] = []
    shared, own = _settings(comparison)
    for label, _ in comparison.experiments:
        mine = [cell for cell in found if cell.label == label]
        done = {cell.experiment.seed: result for cell in mine if (result := cell.result())}
        if not done:
            rows.append({"label": label, "settings": own[label], "seeds": [], "misfit": misfits.get(label)})
            continue
        runs = [cell for cell in mine if cell.experiment.seed in done]
        to_target = _to_target(runs, comparison.target) if comparison.target else None
        rows.append(
            {"label": label, "settings": own[label], **_row(done)}
            | {"to_target": to_target, "runs": [cell.folder.name for cell in runs]}
        )
    head = {"schema": SCHEMA, "name": comparison.name, "seeds": list(comparison.seeds), "target": comparison.target}
    return head | {"settings": shared, "methods": rows}


def save(folder: Path, collected: Mapping[str, Any]) -> None:
    """Write compare.json, compare.md and report.html."""
    files.write_json(folder / "compare.json", dict(collected))
    files.write(
        folder / "compare.md", tables.page(f"{collected['name']}: methods compared", tables.comparison(collected))
    )
    files.write(folder / report.PAGE, report.read(folder).html)


def run_cell(cell: Cell, misfits: dict[str, str], play: Callable[[Run], None]) -> None:
    """Do what is left of a cell; if its method does not fit, the reason goes into `misfits`.

    Raises:
        UserError: Another process is working on it; then nothing is changed.
    """
    with files.claim(cell.folder):
        if cell.result():  # another process was quicker
            return
        try:
            current = take_up(cell.experiment, cell.folder)
        except DoesNotFitError as error:
            misfits[cell.label] = str(error)
            return
        play(current)


def _settings(comparison: Comparison) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What all methods set alike, and of each label the rest, by keys as `--set` has them."""
    found = {
        label: {key: value for key, value in toml.flat(experiment.to_table()) if value is not None}
        for label, experiment in comparison.experiments
    }
    first = next(iter(found.values()))
    alike = {key for key in first if all(key in each and each[key] == first[key] for each in found.values())}
    shared = {key: value for key, value in first.items() if key in alike and key not in _ASIDE}
    return shared, {
        label: {key: value for key, value in each.items() if key not in alike and key not in _ASIDE}
        for label, each in found.items()
    }


def _row(done: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; plans and prices are those of the first."""
    results = list(done.values())
    first = results[0]
    devices = sum(each["devices"] for each in first["classes"])
    return {
        "method": first["method"],
        "seeds": list(done),
        "misfit": None,
        "network": first["network"]["chosen"],
        "accuracy": {
            when: {
                kind: _spread([each["accuracy"][when][kind] for each in results]) for kind in first["accuracy"][when]
            }
            for when in first["accuracy"]
        },
        "worst_class": _worst(results),
        "took_part": 1 - fmean(sum(each["sat_out"] for each in result["classes"]) / devices for result in results),
        "totals": {key: fmean(each["totals"][key] for each in results) for key in first["totals"]},
        "classes": [
            {key: each[key] for key in _OF_CLASS} | {"accuracy": _of_class(results, index)}
            for index, each in enumerate(first["classes"])
        ],
    }


def _to_target(done: Sequence[Cell], target: float) -> dict[str, Any] | None:
    """What it took the seeds that got there, in the mean."""
    found = {cell.experiment.seed: spent for cell in done if (spent := cell.reached(target))}
    if not found:
        return None
    spent = next(iter(found.values()))
    return {"seeds": list(found)} | {key: fmean(each[key] for each in found.values()) for key in spent}


def _of_class(results: Sequence[dict[str, Any]], index: int) -> dict[str, Any] | None:
    """Accuracy after the run over the devices of a class."""
    found = [each["classes"][index]["accuracy"] for each in results]
    kept = [each["after"]["mean_over_devices"] for each in found if each]
    return _spread(kept) if kept else None


def _worst(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Accuracy after the run of the class that is worst off, seed by seed; None where one class or none was tested."""
    found = [
        [row["accuracy"]["after"]["mean_over_devices"] for row in each["classes"] if row["accuracy"]]
        for each in results
    ]
    return _spread([min(each) for each in found]) if all(len(each) > 1 for each in found) else None


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, the standard deviation over seeds where there are two or more, and the value of each."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "values": list(values)}
