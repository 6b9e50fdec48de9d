"""The contract of a method: it lists plans, richest first, and never prices itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lamina import model
from lamina.estimators import PROJECTED
from lamina.job import Job, Local, Turn, Update
from lamina.layout import Axis, Params
from lamina.ops import Ops
from lamina.plan import Absent, Plan, Vote, merge, narrow
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet


@dataclass(frozen=True)
class Objective:
    """What a device minimises, where it is not simply the cross-entropy with the targets.

    Attributes:
        mutual: Weight of the mean KL divergence of an exit from each other exit (DepthFL).
        own_labels: Whether the logits of tokens that the device never has to predict are 0 (HeteroFL).
        widths: Sub-networks of which each step draws one: how many leading units of which axes (FjORD); where a plan
            freezes a prefix, it is cut as well, and so it is not cached.
        distill: Whether the whole network learns from the targets in each step, and the one drawn from the whole.
    """

    mutual: float = 0.0
    own_labels: bool = False
    widths: tuple[Mapping[Axis, int], ...] = ()
    distill: bool = False


@dataclass(frozen=True)
class Method:
    """Who holds what, who trains what, how, and how much each device counts.

    A method is a frozen dataclass; its fields are its hyperparameters and the keys of the `[method]` table. It says
    what differs from federated averaging of a network of which everybody trains everything, and nothing else.

    Hooks of the server: `adapt` and `equip` before the first round; `prepare`, once the network is chosen; in each
    round `plans`, `fitting`, `pick` and `encode` on the way out, `decode`, `weight` and `merge` on the way back;
    `deploy` before an evaluation; `personal` after the last round. Hooks of a device, in order: `remember`,
    `objective`, `pull` (before each update), `finish`. `memory` is what the server keeps for the method besides the
    network; it is saved and restored with a run.

    Attributes:
        absent: What a device that took part but did not train a scalar says about it: "skip" (nothing) or "keep" (the
            old value). See `lamina.plan.merge`.
        on_infeasible: When a device fits no plan of a network: "reject" the network, "drop" the device, or "ignore"
            all budgets, which gives an upper bound and not a run that the fleet could do.
        weighting: A device counts by its "examples", or all count the same ("uniform").
        fallback: For a device that fits no plan: the cheapest one with the gradient found by a "forward" pass along a
            direction, or from two losses ("zeroth" order, without penalties, and only numbers go up); or "none".
        directions: Directions per step of a gradient that is found in one of these ways.
        zeroth_lr: Learning rate of zeroth order, times the number of trained scalars. It is plain SGD, with nothing of
            `[local]` but the schedule.
    """

    absent: Absent = "skip"
    on_infeasible: Literal["reject", "drop", "ignore"] = "reject"
    weighting: Literal["examples", "uniform"] = "examples"
    fallback: Literal["none", "forward", "zeroth"] = "none"
    directions: int = 1
    zeroth_lr: float = 50.0

    group: ClassVar[str] = ""
    source: ClassVar[str] = ""
    cuts: ClassVar[str] = "nothing"
    """What is cut, for people."""
    note: ClassVar[str] = ""
    """What it does to a device's memory, for people, honestly."""
    tasks: ClassVar[tuple[str, ...]] = ("language", "classification")
    """Kinds of task it can do."""
    stateful: ClassVar[str] = ""
    """What a device keeps between rounds, for people; "" if nothing."""
    lossy: ClassVar[bool] = False
    """Whether what a device gets is not the server's network, so that training nothing changes it all the same."""
    own_start: ClassVar[bool] = False
    """Whether devices with the same plan start from tensors of their own, rather than all from the same."""

    for_fleet: ClassVar[bool] = False
    """Whether plans are settled before the first round, by the budgets of all devices; then there is no fallback."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing; a method that refuses more does so besides.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if self.directions < 1:
            raise ValueError(f"directions must be at least 1, got {self.directions}")
        if not self.zeroth_lr > 0:
            raise ValueError(f"zeroth_lr must be above 0, got {self.zeroth_lr}")
        if self.fallback != "none" and self.for_fleet:
            raise ValueError(f'fallback must be "none" where plans are made for the whole fleet, got {self.fallback!r}')

    def adapt(self, spec: Spec) -> Spec:
        """The network with whatever the method adds to it; by default nothing."""
        return spec

    def equip(self, spec: Spec, params: Params, pretrained: Params) -> Params:
        """The first global tensors: by default the pretrained ones and, of what the method added, freshly drawn ones.

        Args:
            spec: The adapted network.
            params: All of its tensors, the pretrained ones among them.
            pretrained: Of the network as it was.
        """
        return params

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """The first memory; by default none. `turn` is the server's before the first round, for those that draw."""
        return {}

    def peak_rounds(self, rounds: int) -> tuple[int, ...]:
        """Rounds of which one asks most of a device; prices are shown, and the network is chosen, for that one."""
        return (0,)

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """The plans a device may get in a turn, richest first. By default the first that fits its budget is taken.

        Args:
            spec: The adapted network.
            turn: The device and the round, for methods that draw or rotate; device -1 stands for any.
            memory: Of the method; empty before the first round.

        Yields:
            Plans, each cheaper than the one before in at least one resource.
        """
        raise NotImplementedError

    def fitting(self, spec: Spec, turn: Turn, memory: Params, fits: Callable[[Plan], Plan | None]) -> Iterator[Plan]:
        """The plans that fit, richest first: by default each is asked for in turn.

        Args:
            spec: As in `plans`.
            turn: As in `plans`.
            memory: As in `plans`.
            fits: Gives a plan back with the levers it needs, or None if it does not fit.
        """
        return (found for plan in self.plans(spec, turn, memory) if (found := fits(plan)))

    def last_resort(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """What is offered to a device that fits none of the plans; see `fallback`."""
        if self.fallback != "none":
            *_, cheapest = self.plans(spec, turn, memory)
            label = f"{cheapest.label}, {'forward mode' if self.fallback == 'forward' else 'zeroth order'}"
            yield replace(cheapest, gradient=self.fallback, label=label)

    def pick(self, feasible: Iterator[Plan], turn: Turn) -> Plan | None:
        """One of the plans that fit, which come as they are asked for, richest first; None if none does."""
        return next(feasible, None)

    def encode(self, params: Params, spec: Spec, plan: Plan, turn: Turn, memory: Params) -> Params:
        """What a device gets: by default its part of the global tensors, shared and not copied where uncut.

        The turn is the server's, and one answer may do for all devices with the same plan; with `own_start` the turn is
        the device's.
        """
        return narrow(params, model.layout(spec), plan)

    def sends(self, spec: Spec, plan: Plan, steps: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what a device sends after so many steps; by default what it trains, as it is.

        Of zeroth order, it is the slopes along its directions; the server makes the tensors of them before `decode`.
        """
        if plan.gradient == "zeroth":
            return {PROJECTED: ((steps, self.directions), torch.float32)}
        layout = model.layout(plan.runs(spec))
        return {name: (plan.shape(layout, name), torch.float32) for name in layout.params if name in plan.trains}

    def decode(self, update: Update, job: Job, spec: Spec) -> Vote:
        """What an update says about the global tensors; by default what it holds."""
        return Vote(job.turn.device, job.plan, update.arrays, self.weight(update))

    def weight(self, update: Update) -> float:
        """How much an update counts in the merge."""
        return float(update.examples) if self.weighting == "examples" else 1.0

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """Global tensors and memory after a round in which somebody voted; by default the overlap mean.

        Args:
            params: Before the round.
            spec: As in `plans`.
            votes: At least one, in ascending order of devices. They come once, as the updates come: a cohort may be too
                large to keep.
            turn: The server's.
            memory: Before the round.
        """
        return merge(params, model.layout(spec), votes, self.absent), memory

    def deploy(self, spec: Spec, params: Params, turn: Turn, memory: Params) -> tuple[Spec, Params]:
        """The network that is evaluated and handed out after `turn.round` (-1 before the first); all by default."""
        return spec, params

    def personal(self, local: Local) -> Local | None:
        """How each device finetunes what was deployed, for itself, after the last round; None: not at all.

        All tensors train, and no budget is kept then.

        Args:
            local: Of the run.
        """
        return None

    def objective(self, job: Job) -> Objective:
        """What a device minimises."""
        return Objective()

    def kept(self, spec: Spec, plan: Plan) -> frozenset[str]:
        """Names of trained tensors for each of which the device keeps another one of its shape between rounds."""
        return frozenset()

    def remember(self, job: Job, params: Mapping[str, Tensor], ops: Ops) -> Params:
        """What a device keeps beside the network during a round: its state, and copies of what it starts from."""
        return {}

    def pull(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> None:
        """Add to the gradients of some trained tensors (whole blocks) what penalties pull at them, in closed form."""

    def finish(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> tuple[Params, Params]:
        """What a device sends, as `sends` says, and what it keeps for its next round."""
        if job.plan.gradient == "zeroth":
            return {PROJECTED: aside[PROJECTED]}, {}
        return {name: params[name].detach() for name in job.plan.trains}, {}


def suffix_label(trained: int, blocks: int) -> str:
    """For people: "last 3 of 12"."""
    return f"last {trained} of {blocks}" if trained < blocks else f"all {blocks}"


def share(size: int, fraction: float) -> int:
    """Units kept of an axis: the fraction, rounded up, at least one."""
    return max(1, math.ceil(round(fraction * size, 9)))


def grouped(spec: Spec, groups: int) -> Spec:
    """The network with so many heads of keys per block, each with as many of queries as it has."""
    shared = spec.heads // (spec.kv_heads or spec.heads)
    return replace(spec, heads=groups * shared, kv_heads=groups if spec.kv_heads else 0)
