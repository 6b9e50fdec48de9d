"""After the last round: each device finetunes what was deployed for itself, and is scored on its own test windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lamina import client
from lamina.data.task import Task
from lamina.engines.local import in_threads
from lamina.job import Job, Local, Turn
from lamina.layout import Params
from lamina.metrics import Score, evaluate
from lamina.plan import Plan
from lamina.spec import Spec


def personalise(
    spec: Spec,
    params: Params,
    task: Task,
    local: Local,
    turn: Turn,
    workers: int,
    progress: Callable[[int, int], None],
) -> Score:
    """Accuracy of every device with a network of its own. All tensors train; no budget is looked at.

    Args:
        spec: What was deployed.
        params: Its tensors; every device starts from them.
        task: Examples and test windows of every device.
        local: How to finetune.
        turn: After the last round.
        workers: Devices computed at a time.
        progress: Told the number of devices that are done, and of all.
    """
    names = frozenset(params)
    plan = Plan(names, names, label="everything")

    def score(job: Job) -> Score:
        device = job.turn.device
        own = client.train(job.owned(), task.train[device], spec).arrays
        return evaluate(spec, own, [task.test[device]], task.scored)

    turns = (Turn(turn.seed, turn.round, turn.rounds, device) for device in range(len(task.train)))
    scores = []
    for each in in_threads(workers, score, [Job(turn, plan, local, params) for turn in turns]):
        scores.append(each)
        progress(len(scores), len(task.train))
    return Score(np.concatenate([each.correct for each in scores]), np.concatenate([each.total for each in scores]))
