"""From an experiment to what it will do: fleet, plans per class, network. Needs no data and no weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamina import checkpoint, model, networks
from lamina.availability import Availability, availability
from lamina.config import Experiment
from lamina.data.task import Task
from lamina.errors import UserError
from lamina.fleet import Budget, Rates, Roster, roster
from lamina.job import Turn
from lamina.layout import Layout
from lamina.plan import Plan
from lamina.planner import Candidate, Fleet, Group, Prefer, assess, choose_network, demand_task, fit
from lamina.spec import Spec
from lamina.traces import Traces

MOST_DEVICES = 10_000_000


@dataclass(frozen=True)
class Outlook:
    """What the budgets lead to.

    Attributes:
        class_of: Class index of every device.
        groups: One per class.
        candidates: One per network, in the order given.
        chosen: The network of the run.
        folder: Where it is.
        steps: Local steps that the prices are for: the most any device takes.
        rates: Of every device.
        availability: Of every device.
        prefer: The rule by which the network was chosen.
    """

    class_of: list[int]
    groups: tuple[Group, ...]
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    folder: Path
    steps: int
    rates: Rates
    availability: Availability
    prefer: Prefer = "trained"

    def fleet(self, experiment: Experiment, task: Task) -> Fleet:
        """What the method may know of the devices."""

        def fits(group: int, plan: Plan) -> bool:
            limit = Budget() if experiment.method.on_infeasible == "ignore" else self.groups[group].budget
            work = (experiment.local, experiment.task.window, self.steps, experiment.levers, experiment.method)
            return not fit(self.chosen.spec, plan, limit, *work).exceeded

        plans = tuple(choice.plan for choice in self.chosen.choices)
        return Fleet(self.class_of, plans, fits, task.mix if task.labels else None)

    def budget_in(self, turn: Turn) -> Budget:
        """What a device can spend in a round."""
        return self.groups[self.class_of[turn.device]].budget_in(turn)

    def able(self) -> np.ndarray:
        """Which devices are of a class that has a plan, bool [devices]."""
        return np.array([choice.plan is not None for choice in self.chosen.choices])[self.class_of]

    def network_json(self) -> dict[str, Any]:
        """The chosen network and the score table."""
        return {
            "chosen": self.chosen.name,
            "prefer": self.prefer,
            "candidates": [each.to_json() for each in self.candidates],
        }

    def classes_json(self) -> list[dict[str, Any]]:
        """Per class: budget, plan and price; for a class that sits out, the price of the cheapest plan."""
        return [self._class_json(index) for index in range(len(self.groups))]

    def _class_json(self, index: int) -> dict[str, Any]:
        group, choice = self.groups[index], self.chosen.choices[index]
        return {
            "name": group.name,
            "devices": group.devices,
            "budget": asdict(group.budget),
            "best_memory_bytes": group.best_memory_bytes,
            "predicted": choice.cost.to_json(),
            "seconds": self._seconds(index),
            "plan": choice.plan.label if choice.plan else None,
            "levers": choice.plan.levers.names() if choice.plan else [],
            "trained_blocks": self.chosen.trained_blocks(index),
            "binding": list(choice.binding),
            "sat_out": 0 if choice.plan else group.devices,
            "parts": parts(self.chosen.spec, choice.plan) if choice.plan else [],
            "accuracy": None,
        }

    def _seconds(self, index: int) -> float | None:
        """Median over the devices of a class of the time that they take, at mean rates; None without devices."""
        members, cost = np.flatnonzero(np.asarray(self.class_of) == index), self.chosen.choices[index].cost
        work = np.tile([cost.down_bytes, cost.flops, cost.up_bytes], (len(members), 1))
        return float(np.median(self.rates.phases(members, work).sum(axis=1))) if len(members) else None


def parts(spec: Spec, plan: Plan) -> list[dict[str, Any]]:
    """What a plan holds and trains of the embeddings, of each block and of the head, from the input to the output.

    Each is a share of the scalars that the server's network has there, at most 1; the head includes the final norm.
    """
    server, device = model.layout(spec), model.layout(plan.runs(spec))
    names = ["embeddings", *(f"block {block}" for block in range(spec.blocks)), "head"]
    sizes = np.zeros((3, len(names)))

    def count(row: int, layout: Layout, name: str, size: int) -> None:
        at = layout.params[name]
        sizes[row, at.block + 1 if at.block is not None else 0 if at.part == "embed" else -1] += size

    for name in server.params:
        count(0, server, name, server.numel(name))
    for name in plan.holds:
        size = math.prod(plan.shape(device, name))
        count(1, device, name, size)
        if name in plan.trains:
            count(2, device, name, size)
    held, trained = np.minimum(1, sizes[1:] / np.maximum(1, sizes[0]))
    rows = zip(names, held.tolist(), trained.tolist(), strict=True)
    return [{"part": name, "held": round(h, 4), "trained": round(t, 4)} for name, h, t in rows]


def load_task(experiment: Experiment) -> Task:
    """The examples of every device.

    Raises:
        UserError: The data cannot be used, or the networks do not read it alike.
    """
    folders = list(_fitted(experiment))
    names = _names(folders)
    digests = [experiment.task.reads(folder) for folder in folders]
    for folder, digest in zip(folders, digests, strict=True):
        if digest != digests[0]:
            raise UserError(
                f"networks {names[folders[0]]} and {names[folder]} do not read data alike (another tokenizer, or other "
                "statistics of pixels), so one cannot stand for the other: name networks of one family"
            )
    class_of = devices(experiment).class_of
    task = experiment.task.load(experiment.seed, class_of, folders[0])
    task = task.validating(experiment.validation) if experiment.validation else task
    if not any(map(len, task.test)):
        raise UserError("no device has a test example, so nothing can be measured; see the test settings of [task]")
    return task


def devices(experiment: Experiment) -> Roster:
    """Class and rates of every device.

    Raises:
        UserError: There are more than fit in memory, or their classes cannot be as they are named.
    """
    fleet, count, seed = experiment.fleet, experiment.task.device_count(), experiment.seed
    if count > MOST_DEVICES:
        raise UserError(f"task.devices must be at most {MOST_DEVICES}, got {count}: each has its place in memory")
    return fleet.roster(count, seed) if isinstance(fleet, Traces) else roster(fleet, count, seed)


def _fitted(experiment: Experiment) -> dict[Path, Spec]:
    """Folders of the candidate networks, each with the network as the task uses it."""
    folders = map(networks.find, experiment.networks)
    return {folder: experiment.task.fit(checkpoint.read_spec(folder), folder) for folder in folders}


def _names(folders: Collection[Path]) -> dict[Path, str]:
    """What each network is called: its folder, with those above it where another has the same name."""

    def alone(folder: Path, parts: int) -> bool:
        return sum(other.parts[-parts:] == folder.parts[-parts:] for other in folders) == 1

    return {
        folder: "/".join(folder.parts[-next(n for n in itertools.count(1) if alone(folder, n)) :]) for folder in folders
    }


def check_task(experiment: Experiment) -> None:
    """Refuse, without looking at data or weights, what cannot do the task.

    Raises:
        UserError: A network is missing or does not fit the task, or the method is not for it.
    """
    for spec in _fitted(experiment).values():
        demand_task(experiment.method, spec)


def measure_classes(experiment: Experiment, outlook: Outlook) -> list[dict[str, Any] | None]:
    """Per class: what the first two steps of its plan really take, in a fresh process; None where it sits out."""
    from lamina.device import Devices
    from lamina.measure import measure

    spec, tokens = outlook.chosen.spec, experiment.task.window
    plans = [choice.plan for choice in outlook.chosen.choices]
    devices, work = Devices(), (experiment.local, tokens, outlook.steps, experiment.method)
    try:
        return [measure(spec, plan, *work, devices=devices).to_json() if plan else None for plan in plans]
    finally:
        devices.close()


def look_ahead(experiment: Experiment, task: Task | None = None) -> Outlook:
    """Price every plan of every candidate network for every class and choose.

    Args:
        experiment: What to run.
        task: Needed where the number of local steps depends on the data (`local.steps = 0`); loaded then if not given.

    Raises:
        UserError: A network is missing or does not fit the task, or nothing fits the budgets.
    """
    count, clock = experiment.task.device_count(), experiment.clock
    if experiment.cohort > count:
        raise UserError(f"cohort = {experiment.cohort} is more than the {count} devices there are")
    fleet = devices(experiment)
    sizes = np.bincount(fleet.class_of, minlength=len(fleet.names)).tolist()
    groups = tuple(map(Group, fleet.names, sizes, fleet.budgets, fleet.best_memory_bytes))
    times = availability(clock.availability, clock.available_hours, count, experiment.seed)
    steps = experiment.local.steps
    if not steps:
        steps = max(experiment.local.round_steps(len(shard)) for shard in (task or load_task(experiment)).train)
    tokens = experiment.task.window
    work = (experiment.local, tokens, steps, experiment.levers, experiment.rounds)
    found = _fitted(experiment)
    names = _names(found)
    candidates = [assess(experiment.method, names[folder], spec, groups, *work) for folder, spec in found.items()]
    chosen = choose_network(experiment.method, candidates, groups, *work, experiment.prefer)
    folder = list(found)[candidates.index(chosen)]
    found_by = (fleet.rates, times, experiment.prefer)
    return Outlook(fleet.class_of, groups, tuple(candidates), chosen, folder, steps, *found_by)
