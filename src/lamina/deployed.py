"""A run on real machines: what the two sides of the Flower app in `lamina/app` do."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from lamina import config, files, networks, wire
from lamina import run as runs
from lamina.clock import Clock
from lamina.config import Experiment
from lamina.engines.flower import FlowerEngine, parts, record
from lamina.errors import UserError
from lamina.node import Node
from lamina.run import Run
from lamina.view import View
from lamina.wire import WireError


@dataclass(frozen=True)
class AppTable:
    """What is to be run: the run config of the app.

    Attributes:
        experiment: TOML file on the server.
        overrides: Single settings, `key=value`, as a list in JSON.
        out: Where the run folder goes.
        name: Of the run folder; "": as `lamina run` calls it.
        resume: Folder of a run to go on with, instead of all these.
        wait: Seconds to wait for devices that are not connected.
    """

    experiment: str = ""
    overrides: str = "[]"
    out: str = "runs"
    name: str = ""
    resume: str = ""
    wait: int = 300


def hello(message: Message, settings: Mapping[str, Any]) -> Message:
    """What a device says of itself; of settings that are not accepted, why."""
    try:
        said = Node(settings).hello()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        said = wire.pack({"reason": str(error)})
    return Message(record(*said), reply_to=message)


def answer(message: Message, settings: Mapping[str, Any]) -> Message:
    """What a device answers to a job."""
    try:
        node = Node(settings)
        said = node.answer(*parts(message.content))
    except (UserError, WireError) as error:
        said = wire.pack({"answer": "failure", "reason": str(error)})
    return Message(record(*said), reply_to=message)


def play(grid: Grid, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Play a run with the devices of a grid; returns what summary.json holds.

    Raises:
        UserError: A setting is not accepted, or too few devices are connected. It has been shown.
    """
    view = View()
    try:
        table = config.build(AppTable, settings, "run config")
        with ExitStack() as held:
            run = _begin(table, view, held)
            engine = engine_of(run, grid, table.wait, view.say)
            run.experiment = in_real_time(run.experiment)
            summary = view.play(run, engine)
    except UserError as error:
        view.say(f"error: {error}")
        raise
    view.outcome(run, summary)
    sent, received = (engine.traffic[way] for way in ("sent", "received"))
    view.say(f"messages of this sitting: {sent} bytes sent, {received} bytes received")
    return summary


def _begin(table: AppTable, view: View, held: ExitStack) -> Run:
    """The run, its folder locked."""
    if table.resume:
        folder = Path(table.resume)
        runs.demand_unfinished(folder)
        held.enter_context(files.lock(folder))
        run = runs.resume(folder)
        for change in runs.changes_since(folder):
            view.say(f"warning: {change}; the result may differ in its last bits from that of an unbroken run")
        return run
    run = runs.start(_experiment(table), Path(table.out), table.name)
    held.enter_context(files.lock(run.folder))
    return run


def _experiment(table: AppTable) -> Experiment:
    try:
        overrides = json.loads(table.overrides)
    except ValueError as error:
        raise UserError(f"run config: overrides must be a list in JSON, got {table.overrides!r}") from error
    if not isinstance(overrides, list) or not all(isinstance(each, str) for each in overrides):
        raise UserError(f"run config: overrides must be a list of key=value, got {table.overrides!r}")
    return real(config.load_experiment(Path(table.experiment), overrides))


def real(experiment: Experiment) -> Experiment:
    """The same for real devices, which compute each for itself, in float32.

    Raises:
        UserError: It has settings that are for simulated devices alone.
    """
    if experiment.clock.availability != Clock.availability:
        raise UserError("clock.availability is for simulated devices; real ones are there or not: leave it out")
    return replace(experiment, engine="serial", precision="float32", enforce=False)


def engine_of(run: Run, grid: Grid, wait_seconds: float, say: Any = print) -> FlowerEngine:
    """What carries the jobs of a run."""
    clock, cohort = run.experiment.clock, run.experiment.cohort
    return FlowerEngine(
        grid,
        run.outlook.chosen.spec,
        networks.digest(run.outlook.folder),
        f"{run.folder.name} {files.digest((run.folder / 'config.toml').read_bytes())}",
        len(run.outlook.class_of),
        cohort if clock.asked(cohort) > cohort else None,
        clock.deadline,
        clock.min_updates,
        wait_seconds,
        say,
    )


def in_real_time(experiment: Experiment) -> Experiment:
    """The same with a virtual clock that loses nobody: who is late, the engine finds out.

    As many are asked as with over-selection; deadline and availability are those of the real devices.
    """
    clock = experiment.clock
    return replace(experiment, cohort=clock.asked(experiment.cohort), clock=Clock(min_updates=clock.min_updates))
