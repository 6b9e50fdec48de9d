"""Methods that cut depth: devices hold the first blocks only, or all of them train the network from the bottom up."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lamina import model
from lamina.job import Job, Turn
from lamina.layout import Axis, Layout, Params
from lamina.methods.base import Method, Objective, share, suffix_label
from lamina.ops import Ops
from lamina.plan import Keep, Plan, Vote
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet


def _between(layout: Layout, first: int, last: int) -> frozenset[str]:
    """Names in the blocks from `first` on and before `last`, exits apart."""
    rows = layout.params.items()
    return frozenset(n for n, row in rows if row.part != "exit" and row.block is not None and first <= row.block < last)


def _input(layout: Layout) -> frozenset[str]:
    """Names of the embeddings."""
    return frozenset(name for name, row in layout.params.items() if row.part == "embed")


def _end(layout: Layout, depth: int) -> frozenset[str]:
    """Names of norm, pooler and head after so many blocks: of an exit, or after all blocks the network's own."""
    if depth == layout.blocks:
        return layout.tail(0)
    return frozenset(name for name, row in layout.params.items() if row.part == "exit" and row.block == depth - 1)


def _first_label(depth: int, blocks: int) -> str:
    return f"first {depth} of {blocks}" if depth < blocks else f"all {blocks}"


def first_blocks(spec: Spec, params: Params, depth: int) -> tuple[Spec, Params]:
    """A network of the first so many blocks, which has no exits: the one after them is its end."""
    short = replace(spec, blocks=depth, exits=())
    end = "" if depth == spec.blocks else f"exit.{depth - 1}."
    rows = model.layout(short).params.items()
    return short, {
        name: params[name if row.part == "embed" or row.block is not None else end + name] for name, row in rows
    }


def _able(fleet: Fleet) -> list[int]:
    """The classes of which devices take part."""
    return sorted({group for group in fleet.class_of if fleet.plans[group] is not None})


@dataclass(frozen=True)
class _FromBelow(Method):
    """What these methods share: exits, if any, and the network as it was pretrained before the first round."""

    group: ClassVar[str] = "depth"

    def equip(self, spec: Spec, params: Params, pretrained: Params) -> Params:
        """Exits start as copies of the final norm, the pooler and the head, as far as the network has them."""
        exits = [name for name, row in model.layout(spec).params.items() if row.part == "exit"]
        return params | {name: pretrained[name.split(".", 2)[2]].clone() for name in exits}

    def deploy(self, spec: Spec, params: Params, turn: Turn, memory: Params) -> tuple[Spec, Params]:
        """What the method says, but before the first round the pretrained network with its own head."""
        if turn.round < 0:
            return first_blocks(spec, params, spec.blocks)
        return self._deployed(spec, params, turn, memory)

    def _deployed(self, spec: Spec, params: Params, turn: Turn, memory: Params) -> tuple[Spec, Params]:
        return spec, params


@dataclass(frozen=True)
class DepthFL(_FromBelow):
    """Each device trains the first k blocks and the exits up to there, which also learn from one another.

    An exit is a norm and a head after a block; the network's own are the last. Networks whose blocks end in a norm
    (BERT) have none in their exits, and those with a pooler have one in each. On a device with K exits the loss is

        sum_i CE(y, p_i) + r(t) / (K - 1) sum_i sum_{j != i} KL(p_j || p_i),  r(t) = exp(-5 (1 - min(t, T) / T)^2)

    with p_j constant where it teaches, and FedDyn's terms - <h_c, w> + alpha / 2 |w - w_t|^2; afterwards
    h_c <- h_c - alpha (w - w_t). The server, for each tensor that n of the N devices trained in a round, with their
    plain mean m: h <- h - alpha n (m - w_t) / N, then w <- m - h / alpha. What is handed out predicts with the mean of
    the logits of all exits. The training loss that is shown is the first line.

    **Source:** Kim, Yu, Kim and Moon, ICLR 2023, section 3; the server's rule as in the first author's code (baseline
    `depthfl` of Flower). FedDyn is Acar et al., ICLR 2021.
    **Departs:** T is a share of the rounds, since the paper's 300 (of 1000) are more than a finetuning run has. Exits
    start as copies of the pretrained norm and head, which shallow blocks were not trained for: at first the mean over
    exits is worse than the pretrained network, which is what is evaluated before the first round. N counts the devices
    that can take part. A tensor that nobody trained in a round stays, as does its h.

    Attributes:
        every: There is an exit after every so many blocks, and one at the end.
        alpha: Of FedDyn; 0 is plain averaging, for which nothing is kept.
        ramp: T as a share of the rounds.
    """

    weighting: Literal["examples", "uniform"] = "uniform"
    every: int = 1
    alpha: float = 0.1
    ramp: float = 0.3

    source: ClassVar[str] = "Kim et al. 2023"
    cuts: ClassVar[str] = "the last blocks"
    note: ClassVar[str] = (
        "Nothing of the blocks above the last exit that fits, but a norm, a head and logits per exit, and with FedDyn "
        "two more copies of all that trains. A head over tens of thousands of tokens is larger than many blocks: have "
        "few (`every`)."
    )
    stateful: ClassVar[str] = "FedDyn's linear term, as large as all it trains"

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must be in [0, 1], got {self.ramp}")

    def adapt(self, spec: Spec) -> Spec:
        """Add the exits; the network's own norm and head are the last."""
        return replace(spec, exits=tuple(range(self.every - 1, spec.blocks - 1, self.every)))

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """With FedDyn, h = 0 for every tensor, and N."""
        if not self.alpha:
            return {}
        able = _able(fleet)
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return zeros | {"devices": torch.tensor(sum(group in able for group in fleet.class_of))}

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """The first k blocks, from all of them down to those before the first exit."""
        layout = model.layout(spec)
        depths = [*(i + 1 for i in spec.exits), spec.blocks]
        for depth in reversed(depths):
            ends = (_end(layout, each) for each in depths if each <= depth)
            names = _input(layout).union(_between(layout, 0, depth), *ends)
            yield Plan(names, names, label=_first_label(depth, spec.blocks))

    def objective(self, job: Job) -> Objective:
        """All exits learn from the targets, and more and more from one another."""
        rounds = self.ramp * job.turn.rounds
        left = max(0.0, 1 - job.turn.round / rounds) if rounds else 0.0
        return Objective(mutual=math.exp(-5 * left**2))

    def kept(self, spec: Spec, plan: Plan) -> frozenset[str]:
        """With FedDyn, all that trains."""
        return plan.trains if self.alpha else frozenset()

    def remember(self, job: Job, params: Mapping[str, Tensor], ops: Ops) -> Params:
        """With FedDyn, what the device starts from, and h_c unless this is its first round."""
        if not self.alpha:
            return {}
        trained = [name for name in params if name in job.plan.trains]
        known = set(job.state)
        starts = {f"start:{name}": ops.copy(params[name]) for name in trained}
        return starts | {f"linear:{name}": job.state[name] for name in trained if name in known}

    def pull(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> None:
        """Add alpha (w - w_t) - h_c."""
        if not self.alpha:
            return
        for name, p in params.items():
            linear = aside.get(f"linear:{name}")
            known = [] if linear is None else [(linear, -1.0)]
            ops.pull(p, (p, self.alpha), (aside[f"start:{name}"], -self.alpha), *known)

    def finish(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> tuple[Params, Params]:
        """What it trained, and h_c - alpha (w - w_t), which takes the place of w_t; the h_c of other tensors stay."""
        arrays, state = super().finish(job, params, aside, ops)
        state |= {name: linear for name, linear in job.state.items() if name not in job.plan.trains}
        if self.alpha:
            for name in (name for name in params if name in job.plan.trains):
                back = aside[f"start:{name}"].add_(params[name].detach(), alpha=-1)
                state[name] = ops.scale(back, self.alpha)
                linear = aside.get(f"linear:{name}")
                if linear is not None:
                    state[name].add_(linear)
        return arrays, state

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """The means, and with FedDyn a step beyond them."""
        voters = Counter[str]()

        def counted() -> Iterator[Vote]:
            for vote in votes:
                voters.update(list(params) if self.absent == "keep" else vote.plan.trains)
                yield vote

        after, _ = super().merge(params, spec, counted(), turn, memory)
        if not self.alpha:
            return after, memory
        linear = dict(memory)
        for name in (name for name, mean in after.items() if mean is not params[name]):
            step = self.alpha * voters[name] / int(memory["devices"]) * (after[name].double() - params[name].double())
            linear[name] = (memory[name].double() - step).float()
            after[name] = (after[name].double() - linear[name].double() / self.alpha).float()
        return after, linear


@dataclass(frozen=True)
class ProgFed(_FromBelow):
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
        able, layout = _able(fleet), model.layout(spec)
        plans = (self._plan(layout, 0, depth) for depth in self._depths(spec.blocks))
        reached = takewhile(lambda plan: all(fleet.fits(group, plan) for group in able), plans)
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
        trains = _between(layout, first, depth) | _end(layout, depth)
        label = _first_label(depth, layout.blocks)
        if first:
            return Plan(_input(layout) | _between(layout, 0, first) | trains, trains, label=f"{label}, new ones alone")
        names = _input(layout) | trains
        return Plan(names, names, label=label)


@dataclass(frozen=True)
class Slt(_FromBelow):
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
        able = _able(fleet)

        def too_wide(whole: int, step: int) -> bool:
            plan = self._plan(spec, whole, step / self.widths, self.training_depth)
            return not all(fleet.fits(group, plan) for group in able)

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
