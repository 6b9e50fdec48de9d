"""A run on real machines: what the two sides of the Flower app in `lamina/app` do."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from lamina import config, files, machine, networks, toml, wire
from lamina import run as runs
from lamina.clock import Clock
from lamina.config import Experiment
from lamina.engines.flower import FlowerEngine, Peer, Peers, parts, record
from lamina.errors import UserError
from lamina.experiment import devices as roster_of
from lamina.fleet import RESOURCES, DeviceClass
from lamina.node import Node
from lamina.run import Run
from lamina.traces import Traces
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
        table = toml.build(AppTable, settings, "run config")
        with ExitStack() as held:
            run, peers = _begin(table, grid, view, held)
            for device, peer in sorted(peers.here.items()):
                if peer.examples != (given := len(run.task.train[device])):
                    view.say(f"note: device {device} has {peer.examples} examples; the plan is made for {given}")
            engine = engine_of(run, peers)
            run.experiment = in_real_time(run.experiment)
            summary = view.play(run, engine)
    except UserError as error:
        view.say(f"error: {error}")
        raise
    view.outcome(run, summary)
    sent, received = (peers.traffic[way] for way in ("sent", "received"))
    view.say(f"messages of this sitting: {sent} bytes sent, {received} bytes received")
    return summary


def _begin(table: AppTable, grid: Grid, view: View, held: ExitStack) -> tuple[Run, Peers]:
    """The run, its folder locked, and the devices. A new one is planned from what they say."""
    if table.resume:
        folder = Path(table.resume)
        runs.demand_unfinished(folder)
        held.enter_context(files.lock(folder))
        run = runs.resume(folder)
        for change in machine.changes_since(folder):
            view.say(f"warning: {change}; the result may differ in its last bits from that of an unbroken run")
        peers = Peers(grid, len(run.outlook.class_of), table.wait, view.say)
        peers.gather()
        return run, peers
    experiment = _experiment(table)
    peers = Peers(grid, experiment.task.device_count(), table.wait, view.say)
    run = runs.start(as_said(experiment, peers.gather()), Path(table.out), table.name)
    held.enter_context(files.lock(run.folder))
    return run, peers


def as_said(experiment: Experiment, peers: Mapping[int, Peer]) -> Experiment:
    """The experiment with the fleet that is there.

    A device is of the class that it says, with the budget that it says; the class of those that say nothing, or are not
    there, is drawn as in a simulation.
    """
    found = roster_of(experiment)
    names, budgets = list(found.names), [asdict(budget) for budget in found.budgets]
    class_of = list(found.class_of)
    for device, peer in peers.items():
        if not peer.class_name:
            continue
        kind = (peer.class_name, dict(peer.budget))
        if kind not in zip(names, budgets, strict=True):
            taken = peer.class_name in names
            names.append(f"{peer.class_name} of device {device}" if taken else peer.class_name)
            budgets.append(kind[1])
            class_of[device] = len(names) - 1
        else:
            class_of[device] = list(zip(names, budgets, strict=True)).index(kind)
    if class_of == found.class_of:
        return experiment
    if isinstance(experiment.fleet, Traces):
        raise UserError('fleet = "traces" is for simulated devices; write [[fleet]] tables for real ones')
    fleet = [*experiment.fleet]
    for name, budget in list(zip(names, budgets, strict=True))[len(fleet) :]:
        fleet.append(DeviceClass(name, **{RESOURCES[key]: amount for key, amount in budget.items()}))
    members = [tuple(device for device, each in enumerate(class_of) if each == index) for index in range(len(fleet))]
    named = (replace(each, devices=devices) for each, devices in zip(fleet, members, strict=True) if devices)
    return replace(experiment, fleet=tuple(named))


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
    if experiment.clock.failures:
        raise UserError("clock.failures is for simulated devices; real ones fail by themselves: leave it out")
    return replace(experiment, engine="serial", precision="float32", enforce=False)


def engine_of(run: Run, peers: Peers) -> FlowerEngine:
    """What carries the jobs of a run."""
    clock, cohort = run.experiment.clock, run.experiment.cohort
    return FlowerEngine(
        peers,
        run.outlook.chosen.spec,
        networks.digest(run.outlook.folder),
        f"{run.folder.name} {files.digest((run.folder / 'config.toml').read_bytes())}",
        cohort if clock.asked(cohort) > cohort else None,
        clock.deadline,
        clock.min_updates,
    )


def in_real_time(experiment: Experiment) -> Experiment:
    """The same with a virtual clock that loses nobody: who is late, the engine finds out.

    As many are asked as with over-selection; deadline and availability are those of the real devices.
    """
    clock = experiment.clock
    return replace(experiment, cohort=clock.asked(experiment.cohort), clock=Clock(min_updates=clock.min_updates))
