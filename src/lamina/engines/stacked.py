"""Devices simulated several at a time: those with equal plans run as one batch, over prefixes that run once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina import client, model
from lamina.batched import stacked
from lamina.data.task import Shard
from lamina.engines.local import in_threads
from lamina.engines.prefix import Feed, Prefixes
from lamina.job import Job, Update
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods.base import Method
from lamina.model import Batch
from lamina.ops import HOST, Ops
from lamina.optim import Kind
from lamina.passes import Passes
from lamina.placement import Placement
from lamina.shapes import FLOAT_BYTES
from lamina.spec import Spec
from lamina.stack import HIDDEN, Stack, Stacked

_ELEMENTWISE = ("sgd", "momentum", "adamw")
"""Optimizers that move each number by itself, so that a stack of devices is one to them."""
_ACTIVATION_BYTES = 2**21
"""Of the widest activation of all devices of a stack: as much as stays near a processor."""
_CARD_BYTES = 2**28
"""The same on a card, logits included: all activations together are some tens of times as much."""
_PARTS = 8
"""On the host, a cohort is cut into at least so many stacks, if there are as many devices, so that workers share it."""


class StackedEngine:
    """Runs groups of devices with equal plans as stacks, in `workers` threads; what cannot be stacked, by itself.

    What is stacked depends on the jobs alone, not on `workers` or on time, so a run can be repeated and resumed bit for
    bit. Against `client.train` of each device, results differ by rounding: products run in other kernels, and the loss
    in chunks. Levers that leave the mathematics as it is are not used: they save memory of devices that are not there.
    """

    def __init__(
        self,
        spec: Spec,
        shards: Sequence[Shard],
        workers: int,
        prefixes: Prefixes,
        dtype: torch.dtype = torch.float32,
        device: torch.device = HOST,
    ) -> None:
        """Serve the given shards, indexed by device, on a network; matrices are multiplied in `dtype` on `device`."""
        self._spec, self._shards, self._workers, self._dtype = spec, shards, workers, dtype
        self._prefixes, self._placement = prefixes, Placement(device)

    def run(self, jobs: Iterable[Job]) -> Iterator[Update]:
        """Updates, stack by stack."""
        jobs = list(jobs)
        self._prefixes.expect(jobs, self._spec, len(self._shards))
        found = stacks(jobs, self._spec, self._shards, self._placement.device)
        for updates in in_threads(self._workers, self._train, found):
            yield from updates

    def reused(self) -> float | None:
        """Share of frozen blocks, times examples, that did not run since the last call; None if there were none."""
        return self._prefixes.reused()

    def _train(self, jobs: Sequence[Job]) -> list[Update]:
        jobs, device = [self._placement.job(job) for job in jobs], self._placement.device
        shards = [self._shards[job.turn.device] for job in jobs]
        if stackable(jobs[0]):
            updates = train_stack(jobs, shards, self._spec, self._prefixes, self._dtype, device)
        else:
            pairs = zip(jobs, shards, strict=True)
            updates = [client.train(job.owned(), shard, self._spec, Ops(device)) for job, shard in pairs]
        return self._placement.updates(updates)


def stackable(job: Job) -> bool:
    """Whether a device can be one of a stack: its steps are backward passes on one network, of a simple optimizer."""
    return job.plan.gradient == "backward" and kind_of(job) in _ELEMENTWISE and not job.method.objective(job).widths


def stacks(jobs: Sequence[Job], spec: Spec, shards: Sequence[Shard], device: torch.device = HOST) -> list[list[Job]]:
    """Jobs whose networks are of equal shape and train alike, a few at a time, in the order of their first devices."""
    alike: dict[Any, list[Job]] = {}
    for job in jobs:
        plan, levers = job.plan, job.plan.levers
        shapes = tuple(sorted((name, job.arrays[name].shape) for name in plan.holds)) if plan.keep else plan.holds
        inexact = (levers.frozen_bits, levers.cache_bits, bool(levers.prefix_cache))
        key = (plan.trains, shapes, plan.network, plan.gradient, kind_of(job), inexact)
        alike.setdefault(key, []).append(job)
    found: list[list[Job]] = []
    for group in alike.values():
        size = _size(group[0], spec, shards, len(jobs), device) if stackable(group[0]) else 1
        found += [group[i : i + size] for i in range(0, len(group), size)]
    return sorted(found, key=lambda stack: stack[0].turn.device)


def _size(job: Job, spec: Spec, shards: Sequence[Shard], cohort: int, device: torch.device) -> int:
    """Devices of a stack."""
    shard, spec = shards[job.turn.device], job.plan.runs(spec)
    inputs, _ = shard.batch(np.arange(min(len(shard), job.local.batch_size)))
    tokens = len(inputs) * spec.length(inputs.shape[1])
    most, parts = (_ACTIVATION_BYTES, _PARTS) if device == HOST else (_CARD_BYTES, 1)
    width = max(spec.ffn, spec.embed, 0 if device == HOST else spec.outputs)
    fits = most // (FLOAT_BYTES * tokens * width)
    return max(1, min(fits, -(-cohort // parts)))


def kind_of(job: Job) -> Kind:
    """The optimizer of a job, after its levers."""
    return (job.plan.levers.optimizer if job.local.kind == "adamw" else "") or job.local.kind


@dataclass
class _Device:
    """One device of a stack.

    Attributes:
        job: Of the device.
        batches: Places of each step.
        feed: Where they come from.
        examples: Of its shard.
        params: Its tensors: the trained ones are in the memory of the stack.
        aside: What it keeps beside the network.
        total: Sum of the losses of its steps.
    """

    job: Job
    batches: Sequence[np.ndarray]
    feed: Feed
    examples: int
    params: Params
    aside: Params
    total: float = 0.0


def train_stack(
    jobs: Sequence[Job],
    shards: Sequence[Shard],
    spec: Spec,
    prefixes: Prefixes,
    dtype: torch.dtype = torch.float32,
    device: torch.device = HOST,
) -> list[Update]:
    """One round of devices that train alike; see `client.train`, which does the same for one.

    A device that has taken all its steps moves no more: devices with more steps come first in the stack, which gets
    shorter. Where batches differ in size, rows that do not count fill them up.

    Args:
        jobs: Of equal shape, as `stacks` puts them together.
        shards: The examples of each device.
        spec: The network.
        prefixes: What is known of frozen prefixes.
        dtype: In which matrices are multiplied.
        device: Where; the tensors of the jobs are there.
    """
    spec = jobs[0].plan.runs(spec)
    all_batches = [job.local.batches(job.turn, len(shard)) for job, shard in zip(jobs, shards, strict=True)]
    order = sorted(range(len(jobs)), key=lambda i: -len(all_batches[i]))
    jobs, shards, all_batches = [jobs[i] for i in order], [shards[i] for i in order], [all_batches[i] for i in order]
    whole = {name: torch.stack([job.arrays[name] for job in jobs]) for name in jobs[0].plan.trains}
    ops, devices = stacked(dtype, device), []
    frozen = _frozen(jobs, spec, ops)
    for place, (job, shard, batches) in enumerate(zip(jobs, shards, all_batches, strict=True)):
        feed = prefixes.feed(job, shard, spec, np.unique(np.concatenate(batches)), ops)
        own = {name: p.value[place] if isinstance(p, Stack) else p for name, p in frozen.items()}
        own |= {name: p[place] for name, p in whole.items()}
        aside = job.method.remember(job, own, ops)
        if job.method.objective(job).own_labels:
            aside["labels"] = ops.labels(shard.at(job.turn), spec.outputs)
        devices.append(_Device(job, [feed.places(rows) for rows in batches], feed, len(shard), own, aside))
    steps = _Steps(spec, devices, whole, frozen, ops)
    for number in range(len(all_batches[0])):
        steps.step(number)
    return [_finished(each, ops) for each in sorted(devices, key=lambda each: each.job.turn.device)]


def _frozen(jobs: Sequence[Job], spec: Spec, ops: Ops) -> Params:
    """What does not train and is not of the prefix: plain where all have the same, stacked where not."""
    layout, plan = model.layout(spec), jobs[0].plan
    found: Params = {}
    for name in (name for name in layout.params if name in plan.holds - plan.trains - plan.below(layout)):
        bits = 32 if name.endswith("bias") else plan.levers.frozen_bits
        if all(job.arrays[name] is jobs[0].arrays[name] for job in jobs):
            found[name] = ops.hold(jobs[0].arrays, name, bits)
        else:
            each = [ops.hold(job.arrays, name, bits) for job in jobs]
            found[name] = cast(Tensor, Stack(torch.stack(each)))
    return found


class _Steps:
    """The steps of the devices of a stack, of which those with more steps come first."""

    def __init__(self, spec: Spec, devices: Sequence[_Device], whole: Params, frozen: Params, ops: Stacked) -> None:
        """Train `whole`, tensors [devices, ...], in place."""
        self._spec, self._devices, self._whole, self._frozen, self._ops = spec, devices, whole, frozen, ops
        job = devices[0].job
        self._job = replace(job, plan=replace(job.plan, levers=Levers(chunked_loss=True)))
        self._cached = bool(job.plan.below(model.layout(spec)))
        single = len(devices) == 1
        self._leaves = {name: (p[0] if single else p).detach().requires_grad_() for name, p in whole.items()}
        rated = job.local.rated(job.turn, model.layout(spec), self._leaves)
        self._optimizer = ops.optimizer(rated, job.local, kind_of(job))
        self._pulls = type(job.method).pull is not Method.pull
        self._aim(len(devices))

    def _aim(self, active: int) -> None:
        """Let only the first so many devices go on."""
        self._ops.aim(active)
        single = len(self._devices) == 1
        params, aside = dict(self._frozen), {}
        for name, p in self._frozen.items():
            if isinstance(p, Stack):
                params[name] = cast(Tensor, Stack(p.value[:active]))
        for name, leaf in self._leaves.items():
            if not single:
                leaf.data = self._whole[name][:active]
            params[name] = leaf if single else cast(Tensor, Stack(leaf))
        for state in self._optimizer.state.values():
            state.update({key: kept[:active] for key, kept in state.items() if kept.dim() and not single})
        if "labels" in self._devices[0].aside:
            labels = torch.stack([device.aside["labels"] for device in self._devices[:active]])
            aside["labels"] = labels[0] if single else cast(Tensor, Stack(labels))
        objective = self._job.method.objective(self._job)
        self._passes = Passes(self._spec, self._job, params, aside, objective, self._cached, self._ops)

    def step(self, number: int) -> None:
        """One update of every device that has so many steps."""
        devices = [device for device in self._devices if len(device.batches) > number]
        if len(devices) < self._ops.devices:
            self._aim(len(devices))
        for losses, _, _ in self._passes.losses(number, *self._batch(devices, number)):
            losses.sum().backward()  # type: ignore[no-untyped-call]
            for device, loss in zip(devices, losses.tolist(), strict=True):
                device.total += loss
        if self._pulls:
            self._pull(devices)
        if self._job.local.clip:
            self._clip(self._job.local.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _batch(self, devices: Sequence[_Device], number: int) -> tuple[Batch, Tensor]:
        """The batches of all devices, one after another, as many rows of each."""
        batches = [device.batches[number] for device in devices]
        most = max(map(len, batches))
        places = [np.concatenate([each, np.repeat(each[:1], most - len(each))]) for each in batches]
        xs = [device.feed.x.read(each) for device, each in zip(devices, places, strict=True)]
        targets = [device.feed.targets[each] for device, each in zip(devices, places, strict=True)]
        for each, batch in zip(targets, batches, strict=True):
            each[len(batch) :] = HIDDEN
        lengths = None
        if self._spec.ragged:
            found = np.concatenate([_lengths(device.feed)[each] for device, each in zip(devices, places, strict=True)])
            xs = [_as_long(x if self._cached else x.clamp(min=0), int(found.max())) for x in xs]
            lengths = self._ops.tensor(found)
        return Batch(torch.cat(xs), lengths), self._ops.tensor(np.concatenate(targets))

    def _pull(self, devices: Sequence[_Device]) -> None:
        """Add the penalties of each device."""
        for place, device in enumerate(devices):
            views = {name: p[place] for name, p in self._whole.items()}
            for name, view in views.items():
                gradient = self._leaves[name].grad
                view.grad = gradient if gradient is None or len(self._devices) == 1 else gradient[place]
            device.job.method.pull(device.job, views, device.aside, self._ops)

    def _clip(self, limit: float) -> None:
        """Scale the gradient of each device to the norm that it may have, as `torch.nn.utils.clip_grad_norm_`."""
        active = self._ops.devices
        gradients = [p.grad.view(active, -1) for p in self._leaves.values() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(each, dim=1) for each in gradients])
        factors = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for each in gradients:
            each.mul_(factors[:, None])


def _lengths(feed: Feed) -> np.ndarray:
    assert feed.lengths is not None
    return feed.lengths


def _as_long(x: Tensor, tokens: int) -> Tensor:
    """Sequences cut, or filled up, to so many tokens."""
    missing = tokens - x.shape[1]
    return x[:, :tokens] if missing <= 0 else F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))


def _finished(device: _Device, ops: Ops) -> Update:
    job = device.job
    arrays, state = job.method.finish(job, device.params, device.aside, ops)
    steps = len(device.batches)
    return Update(job.turn, arrays, device.examples, steps, device.total / steps, state)
