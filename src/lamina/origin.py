"""The state that a run begins with: the pretrained network, and what the method adds."""

from __future__ import annotations

import torch

from lamina import checkpoint, model
from lamina.config import Experiment
from lamina.data.task import Task
from lamina.experiment import Outlook
from lamina.job import Turn
from lamina.layout import Params
from lamina.state import Copies, State
from lamina.turn import generator


def pretrained(experiment: Experiment, outlook: Outlook, task: Task) -> Params:
    """The network as the task uses it: its head is fresh unless it was trained for the same classes."""
    found, found_params = checkpoint.load(outlook.folder)
    spec = experiment.task.fit(found, outlook.folder)
    layout = model.layout(spec)
    if task.labels and (checkpoint.read_labels(outlook.folder) != task.labels or found.pool != spec.pool):
        found_params = {name: p for name, p in found_params.items() if name not in ("head.weight", "head.bias")}
    if missing := layout.params.keys() - found_params.keys():
        seed = int(generator(experiment.seed, "head").integers(2**62))
        fresh = model.init(spec, torch.Generator().manual_seed(seed))
        found_params = found_params | {name: fresh[name] for name in missing}
    return {name: found_params[name] for name in layout.params}


def first_state(experiment: Experiment, outlook: Outlook, task: Task) -> State:
    """The pretrained network, and whatever the method adds, freshly drawn."""
    start = pretrained(experiment, outlook, task)
    spec, method = outlook.chosen.spec, experiment.method
    seed = int(generator(experiment.seed, "init").integers(2**62))
    params = model.init(spec, torch.Generator().manual_seed(seed))
    params = method.equip(spec, params | {name: start[name] for name in params.keys() & start.keys()}, start)
    memory = {
        name: p.clone()
        for name, p in method.prepare(
            spec, params, outlook.fleet(experiment, task), Turn(experiment.seed, 0, experiment.rounds)
        ).items()
    }
    changed = dict.fromkeys([*params, *(f"memory:{name}" for name in memory)], 0)
    return State(0, params, changed, Copies.none(len(outlook.class_of)), memory)
