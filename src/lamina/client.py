"""The whole device: take a job, train on the shard, give back what the plan trains.

Everything here runs on tensors, and, for its price, on the shapes of `lamina.ledger`: what a local round takes is what
this file does, with `source` and `passes`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from lamina import model
from lamina.data.task import Shard
from lamina.duals import Duals
from lamina.estimators import Aimed, Forward, Zeroth
from lamina.job import Job, Update
from lamina.layout import Params
from lamina.methods.base import Objective
from lamina.model import Batch
from lamina.ops import TORCH, Ops
from lamina.passes import Passes, Trainer, groups_of
from lamina.source import Plain, Source, run_prefix
from lamina.spec import Spec


def train(job: Job, shard: Shard, spec: Spec, ops: Ops = TORCH) -> Update:
    """Run the local steps of one round.

    The blocks below the lowest trained one run without gradients: nothing of them is kept, and they get neither
    gradients nor optimizer state. The trained tensors of the job are changed in place, so that a device never
    holds them twice. The plan's levers save memory further; see `lamina.levers`.

    Args:
        job: What to train, from where, how.
        shard: The device's examples; at least one.
        spec: The network, with whatever the method added to it.
        ops: What computes.

    Returns:
        New values of the tensors in `job.plan.trains`. They may be non-finite; the server decides what to make of that.
    """
    spec = job.plan.runs(spec)
    shard = shard.at(job.turn)
    batches = job.local.batches(job.turn, len(shard))
    layout = model.layout(spec)
    source: Source = Plain(shard, spec, ops)
    below: frozenset[str] = frozenset()
    objective = job.method.objective(job)
    if job.plan.caches(layout) and not objective.widths:  # of which each would have a prefix of its own
        below = job.plan.below(layout)
        source = run_prefix(job, shard, spec, ops.examples(np.unique(np.concatenate(batches))), ops)
    ops.moment("load")
    resident = job.plan.holds - below
    params = {name: _hold(job, name, ops) for name in layout.params if name in resident}
    aside = job.method.remember(job, params, ops)
    if objective.own_labels:
        aside["labels"] = ops.labels(shard, spec.outputs)
    trainer = _trainer(spec, job, params, aside, objective, bool(below), ops)
    total = 0.0
    for step, rows in enumerate(batches):
        total += trainer.step(step, *source.batch(rows))
    arrays, state = job.method.finish(job, params, aside, ops)
    return Update(job.turn, arrays, len(shard), len(batches), total / len(batches), state)


class _Steps(Protocol):
    def step(self, number: int, inputs: Batch, targets_BS: Tensor) -> float:
        """One update on a batch; returns the batch's mean loss."""


def _trainer(
    spec: Spec, job: Job, params: Params, aside: Params, objective: Objective, cached: bool, ops: Ops
) -> _Steps:
    """What takes the steps, by how the plan finds its gradient."""
    match job.plan.gradient:
        case "backward":
            return Trainer(spec, job, params, aside, objective, cached, ops)
        case "forward":
            aimed, groups = Aimed(job, params, ops), groups_of(spec, job, params, aside, ops)
            passes = Passes(spec, job, aimed, aside, objective, cached, Duals(ops))
            return Forward(job, aimed, passes, list(groups.values()), ops)
        case "zeroth":
            return Zeroth(job, params, aside, Passes(spec, job, params, aside, objective, cached, ops), ops)


def _hold(job: Job, name: str, ops: Ops) -> Tensor:
    if name in job.plan.trains:
        return job.arrays[name].detach().requires_grad_(job.plan.gradient != "zeroth")
    bits = 32 if name.endswith("bias") else job.plan.levers.frozen_bits
    return ops.hold(job.arrays, name, bits)
