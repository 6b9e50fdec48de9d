"""After the last round: each device finetunes what was deployed for itself, and is scored on its own test windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lamina import client
from lamina.data.task import Task
from lamina.engines.local import in_threads
from lamina.job import Job, Local, Turn
from lamina.layout import Params
from lamina.metrics import Score, evaluate
from lamina.ops import Ops
from lamina.plan import Plan
from lamina.spec import Spec


def personalise(
    spec: Spec,
    params: Params,
    task: Task,
    devices: Sequence[int] | np.ndarray,
    local: Local,
    turn: Turn,
    workers: int,
    ops: Ops,
    progress: Callable[[int, int], None],
) -> Score:
    """Accuracy of devices with networks of their own. All tensors train; no budget is looked at.

    Args:
        spec: What was deployed.
        params: Its tensors; every device starts from them.
        task: Examples and test windows of every device.
        devices: Those that are to have one.
        local: How to finetune.
        turn: After the last round.
        workers: Devices computed at a time.
        ops: What computes, and where.
        progress: Told the number of devices that are done, and of all.
    """
    names, params = frozenset(params), {name: p.to(ops.device) for name, p in params.items()}
    plan = Plan(names, names, label="everything")

    correct, total = np.zeros((2, len(task.test)), np.int64)

    def score(job: Job) -> Score:
        device = job.turn.device
        own = client.train(job.owned(), task.train[device], spec, ops).arrays
        return evaluate(spec, own, [task.test[device]], task.scored, ops=ops)

    turns = (Turn(turn.seed, turn.round, turn.rounds, int(device)) for device in devices)
    scores = in_threads(workers, score, (Job(each, plan, local, params) for each in turns))
    for done, (device, each) in enumerate(zip(devices, scores, strict=True), 1):
        correct[device], total[device] = each.correct[0], each.total[0]
        progress(done, len(devices))
    return Score(correct, total)
