"""A run in a folder: start it, go on with it, and what it leaves behind.

    config.toml       the experiment with every default filled in
    env.json          versions and machine
    rounds.jsonl      a line per round            devices.jsonl   a line per device and round
    state.safetensors everything needed to go on  model/          the finetuned network, as Hugging Face loads it
    summary.json      the result, for programs    report.md       the result, for people
    report.html       the same as a page with charts

Every round ends with an atomic replacement of the state, which also records how long the two line files are then. A
kill at any moment therefore loses at most the round it interrupts, and the run that goes on is the run that was never
stopped, bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import checkpoint, config, files, imports, networks, report, saved, tables, toml, track
from lamina.availability import MODELS
from lamina.config import Experiment
from lamina.data.task import Task
from lamina.engines import Engine
from lamina.engines.simulator import kernels, simulator
from lamina.engines.stacked import StackedEngine
from lamina.errors import UserError, about_place
from lamina.experiment import Outlook, load_task, look_ahead
from lamina.job import Turn
from lamina.layout import Params
from lamina.limits import demand_limits
from lamina.machine import environment, usable_cores
from lamina.metrics import Score, evaluate
from lamina.ops import HOST, Ops
from lamina.origin import first_state
from lamina.personal import personalise
from lamina.placement import card, place
from lamina.saved import Premises, Saved
from lamina.server import DeviceRow, play_round
from lamina.spec import Spec
from lamina.state import State
from lamina.turn import generator

SUMMARY_SCHEMA = "lamina.summary/1"


@dataclass(frozen=True)
class RoundRow:
    """A line of rounds.jsonl.

    Attributes:
        round: Number of the round, from 1.
        loss: Mean local training loss over usable updates, in nats; None if there was none.
        accuracy: As in summary.json; None where the round was not evaluated.
        updates: Usable ones.
        rejected: "device 7: reason" for each that was not.
        up_bytes: Sent by all devices.
        down_bytes: Received by all.
        flops: Computed by all.
        seconds: Wall time, evaluation included.
        clock_seconds: What the virtual clock shows at the end of the round.
        prefix_reused: Share of frozen blocks, times examples, whose outputs the simulation still had from an earlier
            round; None where it does not keep any.
    """

    round: int
    loss: float | None
    accuracy: dict[str, float] | None
    updates: int
    rejected: list[str]
    up_bytes: int
    down_bytes: int
    flops: int
    seconds: float
    clock_seconds: float
    prefix_reused: float | None


@dataclass
class Run:
    """An experiment that is going on in a folder."""

    folder: Path
    experiment: Experiment
    outlook: Outlook
    task: Task
    state: State
    before: Score | None = None
    after: Score | None = None
    own: Score | None = None
    seconds: float = 0.0
    settings: dict[str, str] = field(default_factory=dict)
    told: track.Trackers = field(default_factory=lambda: track.Trackers((), Path(), {}))

    @property
    def workers(self) -> int:
        """Simulated devices computed at a time: on a card one, or one stack."""
        return (self.experiment.workers or usable_cores()) if self.device == HOST else 1

    @property
    def device(self) -> torch.device:
        """Where simulated devices train and accuracy is measured."""
        return place(self.experiment.device)

    def score(self) -> Score:
        """Accuracy of the global network now, on the test examples of `tested`."""
        ops = kernels(self.experiment)
        return evaluate(*self.deployed(), self.task.test, self.task.scored, self.workers, self.tested, ops)

    @cached_property
    def tested(self) -> np.ndarray:
        """Devices that are evaluated, ascending, int64: those with test examples, or a sample of them for the run."""
        found = np.flatnonzero([len(shard) > 0 for shard in self.task.test])
        most = self.experiment.eval_devices or len(found)
        rng = generator(self.experiment.seed, "tested")
        return found if most >= len(found) else np.sort(rng.choice(found, most, replace=False))

    def deployed(self) -> tuple[Spec, Params]:
        """The network that the method hands out now."""
        done = Turn(self.experiment.seed, self.state.round - 1, self.experiment.rounds)
        return self.experiment.method.deploy(self.outlook.chosen.spec, self.state.params, done, self.state.memory)

    def play(
        self,
        on_round: Callable[[RoundRow, Sequence[DeviceRow]], None] = lambda row, devices: None,
        on_progress: Callable[[int, int], None] = lambda done, jobs: None,
        engine: Engine | None = None,
    ) -> dict[str, Any]:
        """Play the rounds that are left, then write the result.

        Args:
            on_round: Told about each finished round.
            on_progress: Told the updates that came and the jobs of the round under way; at the end the devices that are
                personalised and all, if the method asks for that.
            engine: Carries the jobs; by default the devices are simulated in this process.

        Returns:
            What summary.json holds.
        """
        torch.set_num_threads(1)  # the number of threads changes the last bits
        tick = time.perf_counter()
        with self.told:
            engine = engine or simulator(self.experiment, self.outlook, self.task.train, self.workers)
            examples = [len(shard) for shard in self.task.train]
            if self.before is None:
                self.before = self.score()
                tick = self._commit(tick)
                self.told.tell(0, self.before.accuracy(), {})
            while self.state.round < self.experiment.rounds:
                self.state, rows = play_round(self.experiment, self.outlook, examples, engine, self.state, on_progress)
                reused = engine.reused() if isinstance(engine, StackedEngine) else None
                row = self._round_row(rows, self._evaluate_if_due(), reused, time.perf_counter() - tick)
                self._append("rounds.jsonl", [asdict(row)])
                self._append("devices.jsonl", [{"round": row.round} | self._readable(each) for each in rows])
                tick = self._commit(tick)
                self.told.tell(row.round, row.accuracy, asdict(row))
                on_round(row, rows)
            self.own = self._personalised(on_progress)
            return self._finish(tick)

    def _personalised(self, on_progress: Callable[[int, int], None]) -> Score | None:
        """Accuracy of the devices with networks of their own, if the method asks for them; begun anew after a stop."""
        local = self.experiment.method.personal(self.experiment.local)
        if local is None:
            return None
        turn = Turn(self.experiment.seed, self.experiment.rounds, self.experiment.rounds)
        where = self.workers, Ops(self.device)
        return personalise(*self.deployed(), self.task, self.tested, local, turn, *where, on_progress)

    def _evaluate_if_due(self) -> Score | None:
        done, every = self.state.round, self.experiment.eval_every
        if done == self.experiment.rounds:
            self.after = self.score()
            return self.after
        return self.score() if every and done % every == 0 else None

    def _round_row(
        self, rows: Sequence[DeviceRow], score: Score | None, reused: float | None, seconds: float
    ) -> RoundRow:
        losses = [row.loss for row in rows if row.loss is not None]
        return RoundRow(
            round=self.state.round,
            loss=float(np.mean(losses)) if losses else None,
            accuracy=score.accuracy() if score else None,
            updates=len(losses),
            rejected=[f"device {row.device}: {row.rejected}" for row in rows if row.rejected],
            up_bytes=sum(row.up_bytes for row in rows),
            down_bytes=sum(row.down_bytes for row in rows),
            flops=sum(row.flops for row in rows),
            seconds=round(seconds, 3),
            clock_seconds=self.state.totals["clock_seconds"],
            prefix_reused=None if reused is None else round(reused, 4),
        )

    def _readable(self, row: DeviceRow) -> dict[str, Any]:
        names = {"name": self.task.names[row.device], "class": self.outlook.groups[row.group].name}
        return names | {key: value for key, value in vars(row).items() if key != "group"}

    def _append(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def _commit(self, tick: float) -> float:
        """Write the state; returns the new time mark."""
        assert self.before is not None
        now = time.perf_counter()
        self.seconds += now - tick
        saved.write(self.folder, Saved(self.state, self.before, self.after, self.seconds, self._premises()))
        return now

    def _premises(self) -> Premises:
        return Premises(self.settings, self.task.digest, self.outlook.availability.digest)

    def go_on(self) -> None:
        """Take up the run from the state in its folder, if one was written.

        Raises:
            UserError: It is damaged, of another version or network, or what the run began with was changed.
        """
        if (self.folder / saved.FILE).exists():
            found = saved.read(self.folder)
            found.premises.demand(self.folder, self._premises())
            shapes = ({name: p.shape for name, p in state.params.items()} for state in (self.state, found.state))
            if operator.ne(*shapes):
                raise UserError(f"the state in {self.folder} is of another network than its config.toml gives")
            self.state, self.before, self.after, self.seconds = found.state, found.before, found.after, found.seconds
        saved.cut(self.folder)

    def _finish(self, tick: float) -> dict[str, Any]:
        assert self.before is not None and self.after is not None
        names = checkpoint.label_keys(self.task.labels) if self.task.labels else {}
        checkpoint.write(self.folder / "model", *self.deployed(), torch.float32, names, self.outlook.folder)
        imports.copy_beside(self.outlook.folder, self.folder / "model")
        self.seconds += time.perf_counter() - tick
        summary = self.summary()
        files.write(self.folder / "report.md", tables.markdown(summary, self._coverage()))
        files.write_json(self.folder / "summary.json", summary)
        files.write(self.folder / report.PAGE, report.read(self.folder).html)
        return summary

    def summary(self) -> dict[str, Any]:
        """What summary.json holds; documented in docs/json.md."""
        assert self.before is not None and self.after is not None
        classes = self.outlook.classes_json()
        for index, row in enumerate(classes):
            members = [d for d, group in enumerate(self.outlook.class_of) if group == index]
            tested = bool(self.after.total[members].any())
            row["accuracy"] = _accuracies(self.before.of(members), self.after.of(members)) if tested else None
        totals = {"rounds": self.state.round, **self.state.totals, "seconds": round(self.seconds, 1)}
        return {
            "schema": SUMMARY_SCHEMA,
            "name": self.experiment.name,
            "method": self.experiment.to_table()["method"]["name"],
            "accuracy": _accuracies(self.before, self.after),
            "tested_devices": len(self.tested),
            "personalised": self.own.accuracy() if self.own else None,
            "network": self.outlook.network_json(),
            "classes": classes,
            "totals": totals,
            "folder": str(self.folder),
        }

    def _coverage(self) -> list[float]:
        """Share of usable updates that trained each block."""
        trained, updates = Counter[int](), 0
        with open(self.folder / "devices.jsonl", encoding="utf-8") as file:
            for line in map(json.loads, file):
                if line["loss"] is not None:
                    trained.update(line["blocks"])
                    updates += 1
        return [trained[block] / max(1, updates) for block in range(self.outlook.chosen.spec.blocks)]


def start(experiment: Experiment, root: Path, name: str = "") -> Run:
    """Prepare a new run in a new folder under `root`, called `name` if given.

    Raises:
        UserError: Nothing fits, or data, a network or a tracker cannot be used; then no folder is left behind.
    """
    run = _prepare(experiment)
    folder = _new_folder(experiment, root, name)
    try:
        return _begin(run, folder)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def take_up(experiment: Experiment, folder: Path) -> Run:
    """The run of an experiment in a folder that the caller has locked: begun if nothing is there yet, else resumed.

    Raises:
        UserError: As `start`, which leaves the folder empty, or as `resume`.
    """
    if _seen(folder):
        return resume(folder)
    return _begin(_prepare(experiment), folder)


def _seen(folder: Path) -> list[Path]:
    """What is in a folder, but for locks and marks."""
    return [each for each in folder.iterdir() if not each.name.startswith(".")]


def resume(folder: Path) -> Run:
    """Take up the run in `folder`, which the caller has locked, after its last complete round.

    Raises:
        UserError: There is no run, it is finished, its state is damaged or of another version, or a tracker cannot
            begin.
    """
    demand_unfinished(folder)
    run = planned(folder)
    run.go_on()
    run.told = track.Trackers(run.experiment.track, folder, run.experiment.to_table())
    return run


def planned(folder: Path) -> Run:
    """The run in `folder` as it was before its first round; another process may be playing it.

    Raises:
        UserError: Its config.toml cannot be used.
    """
    run = _prepare(config.load_experiment(folder / "config.toml"))
    run.folder, run.settings = folder, saved.settings(folder)
    return run


def demand_unfinished(folder: Path) -> None:
    """Refuse a folder that holds no run, or a finished one.

    Raises:
        UserError: Saying which.
    """
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is not a run: it has no config.toml")
    if (folder / "summary.json").exists():
        raise UserError(f"the run in {folder} is finished; its result is in {folder / 'report.md'}")


def _anchored(experiment: Experiment) -> Experiment:
    """The same with absolute paths and the device that was found, so that the run can go on from anywhere."""
    embedded = networks.embedded()
    names = (name if name in embedded else str(Path(name).absolute()) for name in experiment.networks)
    task: Any = experiment.task
    for key in ("path", "test_path"):
        if getattr(task, key, None) is not None:
            task = replace(task, **{key: str(Path(getattr(task, key)).absolute())})
    clock = experiment.clock
    if clock.availability not in MODELS:
        clock = replace(clock, availability=str(Path(clock.availability).absolute()))
    device = str(place(experiment.device))
    return replace(experiment, networks=tuple(names), task=task, clock=clock, device=device)


def _prepare(experiment: Experiment) -> Run:
    if experiment.enforce:
        demand_limits()
    track.demand(experiment.track)
    place(experiment.device)
    task = load_task(experiment)
    outlook = look_ahead(experiment, task)
    return Run(Path(), experiment, outlook, task, first_state(experiment, outlook, task))


def _begin(run: Run, folder: Path) -> Run:
    """Write what there is of a run before its first round, and tell the trackers; on an error the folder is emptied."""
    run.folder = folder
    try:
        files.write(folder / "config.toml", toml.dump(_anchored(run.experiment).to_table()))
        files.write_json(folder / "env.json", environment() | {"card": card(run.device)})
        run.settings = saved.settings(folder)
        run.told = track.Trackers(run.experiment.track, folder, run.experiment.to_table())
    except Exception:
        for each in _seen(folder):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        raise
    return run


def _new_folder(experiment: Experiment, root: Path, name: str) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            folder = root / unused_name(experiment, root, name)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        if told := about_place(error):
            raise UserError(f"run folders cannot go to {root}: {told}") from error
        raise


def unused_name(experiment: Experiment, root: Path, name: str = "") -> str:
    """What a run folder under `root` can be called, beginning with `name` if given."""
    name = name or f"{experiment.name}-{files.digest(toml.dump(experiment.to_table()).encode())[:8]}"
    names = (name + (f"-{count}" if count > 1 else "") for count in itertools.count(1))
    return next(each for each in names if not (root / each).exists())


def _accuracies(before: Score, after: Score) -> dict[str, dict[str, float]]:
    return {"before": before.accuracy(), "after": after.accuracy()}
