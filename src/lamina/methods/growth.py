"""Methods by which a network grows with the rounds, from below: all devices train it, as far as the weakest can."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lamina import model
from lamina.job import Turn
from lamina.layout import Axis, Layout, Params
from lamina.methods.base import share, suffix_label
from lamina.methods.depth import FromBelow, between, embeddings, ending, first_blocks, first_label
from lamina.plan import Keep, Plan
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet


@dataclass(frozen=True)
class ProgFed(FromBelow):
    """The network grows: stage s trains the first s of S groups of blocks with a norm and head of their own.

    Stage s begins in round (s - 1) g T / S of T; for the rest of them, the whole network trains. At the beginning of a
    stage after the first, its new blocks and its head train alone (warm-up). What is handed out is the network of the
    stage.

    **Source:** Wang, Stich, He and Fritz, ICML 2022, section 3; g = 1/2 and S = 4 as in their settings.
    **Departs:** the warm-up rounds are part of a stage and not added to the rounds of the run; a stage of one round has
    none. Heads of stages start as copies of the pretrained norm and head, and the last stage has those themselves. The
    last stage is training of the whole network, so budgets end the growth at the last stage that every class reaches;
    before that is known, each class is shown with the last stage that it reaches. Optimizers start anew in each
    round anyway; the learning rate does not pause in the warm-up.

    Attributes:
        stages: S, at most as many as there are blocks.
        growth: g.
        warmup: Share of a stage's g T / S rounds; rounded, and at least one round unless 0 (25 of 375 in the paper).
    """

    stages: int = 4
    growth: float = 0.5
    warmup: float = 0.0667

    source: ClassVar[str] = "Wang et al. 2022"
    for_fleet: ClassVar[bool] = True
    cuts: ClassVar[str] = "the last blocks, in the first rounds"
    note: ClassVar[str] = (
        "Saves on average and not at the peak, which is training of the whole network, or of as much of it as all "
        "classes can train."
    )

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1, got {self.stages}")
        if not 0 <= self.growth <= 1:
            raise ValueError(f"growth must be in [0, 1], got {self.growth}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")

    def adapt(self, spec: Spec) -> Spec:
        """Add an exit after each stage but the last."""
        return replace(spec, exits=tuple(depth - 1 for depth in self._depths(spec.blocks)[:-1]))

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """The number of stages that every class reaches."""
        layout = model.layout(spec)
        plans = (self._plan(layout, 0, depth) for depth in self._depths(spec.blocks))
        reached = takewhile(lambda plan: all(fleet.fits(group, plan) for group in fleet.able), plans)
        return {"stages": torch.tensor(sum(1 for _ in reached))}

    def peak_rounds(self, rounds: int) -> tuple[int, ...]:
        """The last one."""
        return (rounds - 1,)

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """That of the stage; before it is known how far the fleet gets, those of all stages."""
        layout, depths = model.layout(spec), self._depths(spec.blocks)
        if not memory:
            yield from (self._plan(layout, 0, depth) for depth in reversed(depths))
            return
        stage, warm = self._stage(spec, turn, memory)
        yield self._plan(layout, depths[stage - 1] if warm else 0, depths[stage])

    def _deployed(self, spec: Spec, params: Params, turn: Turn, memory: Params) -> tuple[Spec, Params]:
        """The network of the stage."""
        return first_blocks(spec, params, self._depths(spec.blocks)[self._stage(spec, turn, memory)[0]])

    def _depths(self, blocks: int) -> list[int]:
        """Blocks of each stage."""
        count = min(self.stages, blocks)
        return [blocks * stage // count for stage in range(1, count + 1)]

    def _stage(self, spec: Spec, turn: Turn, memory: Params) -> tuple[int, bool]:
        """Index of the stage in a round, and whether it is in its warm-up; of stages that begin together, the last."""
        length = self.growth * turn.rounds / len(self._depths(spec.blocks))
        starts = [math.ceil(round(length * stage, 9)) for stage in range(int(memory["stages"]))]
        stage = bisect_right(starts, turn.round) - 1
        played = ([*starts, turn.rounds])[stage + 1] - starts[stage]
        wanted = max(1, round(self.warmup * length)) if self.warmup and stage else 0
        return stage, turn.round - starts[stage] < min(wanted, played - 1)

    def _plan(self, layout: Layout, first: int, depth: int) -> Plan:
        """Hold so many blocks; train those from `first` on, and with all of them the embeddings."""
        trains = between(layout, first, depth) | ending(layout, depth)
        label = first_label(depth, layout.blocks)
        if first:
            return Plan(
                embeddings(layout) | between(layout, 0, first) | trains, trains, label=f"{label}, new ones alone"
            )
        names = embeddings(layout) | trains
        return Plan(names, names, label=label)


@dataclass(frozen=True)
class Slt(FromBelow):
    """Successive layer training: block after block trains at full width, those above it thin, those below frozen.

    In configuration j the first j blocks are whole, of which the last `training_depth` train; of the later ones only
    the first s_j of heads and feed-forward units are there, and train, as do the final norm and the head. s_j is the
    largest width that every class can train; s_j grows with j, and a configuration in which it is 1 is the last. In
    the first, j = 0, everything is thin, and nothing is frozen. What is handed out is the network of the configuration.

    Rounds: s_0 T for the first configuration, and for each of the others a part of the rest in proportion to the
    scalars that it trains. A device that can do more trains more of the blocks that are whole.

    **Source:** Pfeiffer, Khalili and Henkel, NeurIPS 2023, section 3; rounds and widths as in the authors' code (SLT).
    **Departs:** later blocks keep the whole residual stream; to cut it, as in the paper, would lose what they were
    pretrained for. The embeddings train where every block does, s_0 is its own (the code takes s_1), and widths have
    steps of 1/100 (`widths`) in the place of 1/1000. Configurations that some class cannot train at any width are left
    out. Before the widths of the fleet are known, each class is shown with what it could do itself in the first.

    Attributes:
        training_depth: Blocks at full width that at least train.
        widths: Number of widths to choose from, 1/n to 1.
        first: Rounds of the first configuration: s_0 T ("width"), or a part in proportion as for the others ("share").
    """

    weighting: Literal["examples", "uniform"] = "uniform"
    training_depth: int = 1
    widths: int = 100
    first: Literal["width", "share"] = "width"

    source: ClassVar[str] = "Pfeiffer et al. 2023"
    for_fleet: ClassVar[bool] = True
    cuts: ClassVar[str] = "heads and feed-forward units of later blocks"
    note: ClassVar[str] = (
        "Widths fill the budget of the weakest class in every round; the residual stream, and the weights of frozen "
        "blocks, are whole."
    )

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        for key in ("training_depth", "widths"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """The configurations: for each, the number of whole blocks and the width of the others."""

        def too_wide(whole: int, step: int) -> bool:
            plan = self._plan(spec, whole, step / self.widths, self.training_depth)
            return not all(fleet.fits(group, plan) for group in fleet.able)

        last = next((whole for whole in range(spec.blocks) if not too_wide(whole, self.widths)), spec.blocks)
        found, limit = list[tuple[int, float]](), self.widths
        for whole in range(last, -1, -1):  # from above, since no width may be larger than the next
            if widest := bisect_right(range(1, limit + 1), False, key=partial(too_wide, whole)):
                found.append((whole, widest / self.widths))
                limit = widest
        return {"configurations": torch.tensor(found[::-1], dtype=torch.float64)}

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """Those of the configuration; before it is known, those of the first one at all widths."""
        if memory:
            whole, width = self._configuration(spec, turn, memory)
            least = min(self.training_depth, whole)
            yield from (self._plan(spec, whole, width, depth) for depth in range(whole, least - 1, -1))
            return
        before = None
        for step in range(self.widths, 0, -1):
            plan = self._plan(spec, 0, step / self.widths, self.training_depth)
            if plan.keep != before:
                yield plan
            before = plan.keep

    def _deployed(self, spec: Spec, params: Params, turn: Turn, memory: Params) -> tuple[Spec, Params]:
        """The network of the configuration, with zeros for what is cut, which is the same function."""
        layout, (whole, width) = model.layout(spec), self._configuration(spec, turn, memory)
        plan, padded = self._plan(spec, whole, width, self.training_depth), dict(params)
        for name in layout.params:
            index = plan.index(layout, name)
            if index is not None:
                padded[name] = torch.zeros_like(params[name])
                padded[name][index] = params[name][index]
        return spec, padded

    def _configuration(self, spec: Spec, turn: Turn, memory: Params) -> tuple[int, float]:
        """Whole blocks, and the width of the others, in a round."""
        found = [(int(whole), width) for whole, width in memory["configurations"].tolist()]
        apart = int(self.first == "width")
        alone = apart * math.floor(round(found[0][1] * turn.rounds, 9))
        sums = list(accumulate(self._trained(spec, *each) for each in found[apart:]))
        ends = [alone] * apart + [alone + (turn.rounds - alone) * each // sums[-1] for each in sums]
        return found[min(bisect_right(ends, turn.round), len(found) - 1)]

    def _trained(self, spec: Spec, whole: int, width: float) -> int:
        """Number of scalars that a device trains at least."""
        layout, plan = model.layout(spec), self._plan(spec, whole, width, self.training_depth)
        return sum(math.prod(plan.shape(layout, name)) for name in plan.trains)

    def _plan(self, spec: Spec, whole: int, width: float, depth: int) -> Plan:
        """Train the last so many of the whole blocks, and all that comes after them at a width."""
        layout, first = model.layout(spec), max(0, whole - depth)
        keep = {}
        for block in range(whole, spec.blocks):
            for axis in (Axis(f"h.{block}.heads"), Axis(f"h.{block}.ffn")):
                if (count := share(layout.sizes[axis], width)) < layout.sizes[axis]:
                    keep[axis] = Keep(count)
        label = suffix_label(spec.blocks - first, spec.blocks)
        if keep:
            label += f", the last {spec.blocks - whole} at {width:.0%}"
        return Plan(frozenset(layout.params), layout.tail(spec.blocks - first), keep, label)
