"""The whole device: take a job, train on the shard, give back what the plan trains."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina import model
from lamina.data.task import Shard
from lamina.job import Job, Local, Update
from lamina.layout import Params
from lamina.model import Ops, Spec


def train(job: Job, shard: Shard, spec: Spec) -> Update:
    """Run the local steps of one round.

    The blocks below the lowest trained one run without gradients: nothing of them is kept, and they get neither
    gradients nor optimizer state. The trained tensors of the job are changed in place, so that a device never
    holds them twice.

    Args:
        job: What to train, from where, how.
        shard: The device's examples; at least one.
        spec: The network, with whatever the method added to it.

    Returns:
        New values of the tensors in `job.plan.trains`. They may be non-finite; the server decides what to make of that.
    """
    trained = {name: p.detach().requires_grad_() for name, p in job.arrays.items() if name in job.plan.trains}
    params = job.arrays | trained
    optimizer = _optimizer(list(trained.values()), job.local, job.local.round_lr(job.turn))
    boundary = job.plan.first_trained(model.layout(spec))
    total = 0.0
    batches = job.local.batches(job.turn, len(shard))
    for rows in batches:
        ids_BS, targets_BS = (torch.from_numpy(array) for array in shard.batch(rows))
        step_loss = loss(spec, params, ids_BS, targets_BS, boundary)
        step_loss.backward()  # type: ignore[no-untyped-call]
        if job.local.clip:
            torch.nn.utils.clip_grad_norm_(trained.values(), job.local.clip)
        optimizer.step()
        optimizer.zero_grad()
        total += step_loss.item()
    arrays = {name: p.detach() for name, p in trained.items()}
    return Update(job.turn, arrays, len(shard), len(batches), total / len(batches))


def loss(
    spec: Spec, params: Params, ids_BS: Tensor, targets_BS: Tensor, boundary: int, ops: Ops = model.TORCH
) -> Tensor:
    """Mean next-token loss of ids and targets BS, with no graph below block `boundary`."""
    blocks = model.found_blocks(spec, params)
    with torch.set_grad_enabled(boundary == 0):
        x_BSD = model.embed(spec, params, ids_BS, ops)
        x_BSD = model.run_blocks(spec, params, x_BSD, [i for i in blocks if i < boundary], ops)
    x_BSD = model.run_blocks(spec, params, x_BSD, [i for i in blocks if i >= boundary], ops)
    return ops.cross_entropy(model.head(spec, params, x_BSD, ops), targets_BS)


def _optimizer(trained: list[Tensor], local: Local, lr: float) -> torch.optim.Optimizer:
    if local.optimizer == "sgd":
        return torch.optim.SGD(trained, lr, momentum=local.momentum, weight_decay=local.weight_decay, fused=True)
    return torch.optim.AdamW(trained, lr, weight_decay=local.weight_decay, fused=True)
