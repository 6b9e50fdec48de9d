"""How a device finds a gradient without a backward pass: along directions, or from differences of two losses.

A direction is standard normal and is drawn anew, tensor by tensor, whenever it is needed; it is a function of seed,
round, device, step, its index in the step, and the tensor's name. So it takes no memory and never has to be sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from lamina.duals import Dual, parts
from lamina.job import Job, Turn, Update
from lamina.layout import Params
from lamina.model import Batch
from lamina.ops import TORCH, Draw, Ops

PROJECTED = "projected"
"""What a device of zeroth order sends: the slope of the loss along each direction, float32 [steps, directions]."""
STRETCH = 1e-3
"""How far along a direction the two losses are, as in all experiments of Malladi et al. 2023."""


class Passes(Protocol):
    """Forward passes of a device's network at the tensors as they are."""

    def losses(self, number: int, inputs: Batch, targets_BS: Tensor) -> Iterator[tuple[Tensor, float, bool]]:
        """Mean loss of each pass of a step, its share, and whether it is the one that is reported."""


class Group(Protocol):
    """Trained tensors that are updated together; see `lamina.client`."""

    params: Mapping[str, Tensor]

    def complete(self) -> None:
        """Add the gradient of penalties."""

    def norm(self) -> Tensor:
        """Of the gradient."""

    def update(self, norm: Tensor | None = None) -> None:
        """Move along the gradient and drop it."""

    def forget(self) -> None:
        """Drop the gradient."""


def _draw(turn: Turn, number: int, index: int, name: str) -> Draw:
    return partial(turn.rng, f"direction/{number}/{index}/{name}")


class Aimed(Mapping[str, Tensor]):
    """A device's tensors as dual numbers, the trained ones with their parts of a direction, made when asked for."""

    def __init__(self, job: Job, params: Mapping[str, Tensor], ops: Ops) -> None:
        """Along the first direction of the first step."""
        self._job, self._params, self._ops, self._at = job, params, ops, (0, 0)

    def aim(self, number: int, index: int) -> None:
        """Along another direction."""
        self._at = number, index

    def __getitem__(self, name: str) -> Tensor:
        """A plain tensor where it is frozen."""
        value = self._params[name]
        if name not in self._job.plan.trains:
            return value
        return cast(Tensor, Dual(value, self._ops.direction(value, _draw(self._job.turn, *self._at, name))))

    def __contains__(self, name: object) -> bool:
        """Without making it."""
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._params)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._params)


class Forward:
    """Steps of the optimizer along forward gradients, g = mean_i (v_i . dL) v_i, which on average are dL.

    One forward pass on dual numbers gives v . dL exactly. Directions are drawn once more when the gradient is made, so
    beside the network there are only the tangents of what a pass has at hand, and then the gradient.

    **Source:** Baydin, Pearlmutter, Syme, Wood and Torr 2022, section 3.
    """

    def __init__(self, job: Job, aimed: Aimed, passes: Passes, groups: Sequence[Group], ops: Ops) -> None:
        """Update the `groups` of a job's trained tensors; `passes` run on `aimed`."""
        self._job, self._aimed, self._passes, self._groups, self._ops = job, aimed, passes, groups, ops

    @torch.no_grad()
    def step(self, number: int, inputs: Batch, targets_BS: Tensor) -> float:
        """One optimizer step on a batch; returns its mean loss."""
        total, slopes, count = 0.0, [], self._job.method.directions
        for index in range(count):
            self._aimed.aim(number, index)
            slopes.append(0.0)
            for loss, share, counted in self._passes.losses(number, inputs, targets_BS):
                value, tangent = parts(loss)
                total += share * value.item() / count if counted else 0.0
                slopes[-1] += share * tangent.item() if tangent is not None else 0.0
                del loss, value, tangent
        self._ops.moment("update")
        norm: Tensor | None = None
        if self._job.local.clip and len(self._groups) > 1:
            norms = []
            for group in self._groups:
                self._find(group, number, slopes)
                norms.append(group.norm())
                group.forget()
            norm = self._ops.norm_of(norms)
        for group in self._groups:
            self._find(group, number, slopes)
            group.update(norm)
        return total

    def _find(self, group: Group, number: int, slopes: Sequence[float]) -> None:
        """The gradient of a group."""
        for name, p in group.params.items():
            terms = [(_draw(self._job.turn, number, i, name), slope / len(slopes)) for i, slope in enumerate(slopes)]
            self._ops.steer(p, terms)
        group.complete()


class Zeroth:
    """Plain SGD along slopes from two losses: with L+- at p +- e z_i, g_i = (L+ - L-) / (2 e), p -= lr mean_i g_i z_i.

    The learning rate is `zeroth_lr` over the number of trained scalars, since a step along g z is longer by about that
    number than one along the gradient.

    The tensors are moved in place, and back, to where they were but for rounding, which `unfold` repeats.

    **Source:** Malladi et al., NeurIPS 2023 (MeZO), Algorithms 1 and 2 (n-SPSA).
    **Departs:** from the losses of methods in which one output teaches another and stands still meanwhile: here the
    teacher moves too, and penalties, which are gradients in closed form, are left out.
    """

    def __init__(self, job: Job, params: Mapping[str, Tensor], aside: Params, passes: Passes, ops: Ops) -> None:
        """Move what the job trains of `params`; the slopes go to `aside`."""
        self._job, self._aside, self._passes, self._ops = job, aside, passes, ops
        self._trained = {name: p for name, p in params.items() if name in job.plan.trains}
        self._slopes: list[list[float]] = []

    @torch.no_grad()
    def step(self, number: int, inputs: Batch, targets_BS: Tensor) -> float:
        """One step on a batch; returns the mean of its losses."""
        total, slopes, count = 0.0, [], self._job.method.directions
        for index in range(count):
            ends = []
            for factor in (STRETCH, -2 * STRETCH):
                self._shift(number, index, factor)
                ends.append(0.0)
                for loss, share, counted in self._passes.losses(number, inputs, targets_BS):
                    ends[-1] += share * loss.item()
                    total += share * loss.item() / (2 * count) if counted else 0.0
                    del loss
            self._shift(number, index, STRETCH)
            slopes.append(float(np.float32((ends[0] - ends[1]) / (2 * STRETCH))))
        _descend(self._job, self._trained, number, slopes, self._ops)
        self._slopes.append(slopes)
        self._aside[PROJECTED] = self._ops.tensor(np.array(self._slopes, dtype=np.float32))
        return total

    def _shift(self, number: int, index: int, factor: float) -> None:
        _shift(self._job.turn, self._trained, number, index, factor, self._ops)


def _shift(turn: Turn, params: Mapping[str, Tensor], number: int, index: int, factor: float, ops: Ops) -> None:
    ops.moment("update")
    for name, p in params.items():
        ops.shift(p, _draw(turn, number, index, name), factor)


def _descend(job: Job, params: Mapping[str, Tensor], number: int, slopes: Sequence[float], ops: Ops) -> None:
    numbers = sum(p.numel() for p in params.values())
    lr = job.method.zeroth_lr / numbers * job.local.round_lr(job.turn) / job.local.lr
    for index, slope in enumerate(slopes):
        _shift(job.turn, params, number, index, -lr * slope / len(slopes), ops)


@torch.no_grad()
def unfold(update: Update, job: Job) -> Update:
    """The update with the trained tensors in the place of the slopes that a device of zeroth order sends.

    What moved the tensors there is done once more here, in the same order, so they are the same bit for bit on machines
    that round alike. Any other update is returned as it is.
    """
    if PROJECTED not in update.arrays:
        return update
    params = {name: array.clone() for name, array in job.arrays.items() if name in job.plan.trains}
    for number, slopes in enumerate(update.arrays[PROJECTED].tolist()):
        for index in range(len(slopes)):
            for factor in (STRETCH, -2 * STRETCH, STRETCH):
                _shift(job.turn, params, number, index, factor, TORCH)
        _descend(job, params, number, slopes, TORCH)
    others = {name: array for name, array in update.arrays.items() if name != PROJECTED}
    return replace(update, arrays=params | others)
