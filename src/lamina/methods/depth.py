"""Methods that cut depth: devices hold the first blocks only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lamina import model
from lamina.job import Job, Turn
from lamina.layout import Layout, Params
from lamina.methods.base import Method, Objective
from lamina.ops import Ops
from lamina.plan import Plan, Vote
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet


def between(layout: Layout, first: int, last: int) -> frozenset[str]:
    """Names in the blocks from `first` on and before `last`, exits apart."""
    rows = layout.params.items()
    return frozenset(n for n, row in rows if row.part != "exit" and row.block is not None and first <= row.block < last)


def embeddings(layout: Layout) -> frozenset[str]:
    """Names of the embeddings."""
    return frozenset(name for name, row in layout.params.items() if row.part == "embed")


def ending(layout: Layout, depth: int) -> frozenset[str]:
    """Names of norm, pooler and head after so many blocks: of an exit, or after all blocks the network's own."""
    if depth == layout.blocks:
        return layout.tail(0)
    return frozenset(name for name, row in layout.params.items() if row.part == "exit" and row.block == depth - 1)


def first_label(depth: int, blocks: int) -> str:
    """What a plan of the first so many blocks is called."""
    return f"first {depth} of {blocks}" if depth < blocks else f"all {blocks}"


def first_blocks(spec: Spec, params: Params, depth: int) -> tuple[Spec, Params]:
    """A network of the first so many blocks, which has no exits: the one after them is its end."""
    short = replace(spec, blocks=depth, exits=())
    end = "" if depth == spec.blocks else f"exit.{depth - 1}."
    rows = model.layout(short).params.items()
    return short, {
        name: params[name if row.part == "embed" or row.block is not None else end + name] for name, row in rows
    }


@dataclass(frozen=True)
class FromBelow(Method):
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
class DepthFL(FromBelow):
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
    exits is worse than the pretrained network, which is what is evaluated before the first round; after it all exits
    count, also those that no device is deep enough to train. N counts the devices that can take part. A tensor that
    nobody trained in a round stays, as does its h.

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
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return zeros | {"devices": torch.tensor(sum(fleet.plans[group] is not None for group in fleet.class_of))}

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """The first k blocks, from all of them down to those before the first exit."""
        layout = model.layout(spec)
        depths = [*(i + 1 for i in spec.exits), spec.blocks]
        for depth in reversed(depths):
            ends = (ending(layout, each) for each in depths if each <= depth)
            names = embeddings(layout).union(between(layout, 0, depth), *ends)
            yield Plan(names, names, label=first_label(depth, spec.blocks))

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
