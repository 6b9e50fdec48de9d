"""Methods that add low-rank matrices and train those."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lamina import model
from lamina.job import Job, Turn
from lamina.layout import Axis, Layout, Params, Part
from lamina.methods.base import Method, suffix_label
from lamina.ops import Ops
from lamina.plan import Keep, Plan, Vote
from lamina.spec import LINEARS, Lora, Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet

_TARGETS = {"all": LINEARS, "qv": ("attn.q", "attn.v")}
_RANK = Axis("rank")


@dataclass(frozen=True)
class Added(Method):
    """What methods share that add tensors to the last t blocks and train those.

    Attributes:
        depth: "all" blocks, "budget" (the last t, as many as fit each device), or a number (the last so many).
        train_head: Whether the head trains.
    """

    depth: Literal["all", "budget"] | int = "all"
    train_head: bool = True

    group: ClassVar[str] = "added"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if isinstance(self.depth, int) and self.depth < 1:
            raise ValueError(f'depth must be "all", "budget" or a number from 1 on, got {self.depth}')

    def depths(self, layout: Layout) -> range:
        """Numbers of trained blocks, largest first."""
        deepest = min(self.depth, layout.blocks) if isinstance(self.depth, int) else layout.blocks
        return range(deepest, 0 if self.depth == "budget" else deepest - 1, -1)

    def added(self, layout: Layout, trained: int, *parts: Part) -> frozenset[str]:
        """Names of these parts in the last blocks."""
        return frozenset(name for name in layout.tail(trained) if layout.params[name].part in parts)

    def head(self, layout: Layout) -> frozenset[str]:
        """Name of the head if it trains."""
        return frozenset(name for name, row in layout.params.items() if self.train_head and row.part == "head")

    def held(self, layout: Layout, part: Part) -> frozenset[str]:
        """The network, and of what is added to its linears this part where some device ever trains it."""
        network = frozenset(name for name, row in layout.params.items() if row.part not in ("lora", "sparse"))
        return network | self.added(layout, self.depths(layout)[0], part)


@dataclass(frozen=True)
class LowRank(Method):
    """What methods share that put low-rank matrices beside linear layers.

    Attributes:
        rank: r of the matrices.
        alpha: Numerator of their scale; 2 r if 0.
        targets: Beside "all" linears of a block, or "qv".
    """

    rank: int = 8
    alpha: float = 0.0
    targets: Literal["all", "qv"] = "all"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")

    @property
    def scale(self) -> float:
        """Of B A: alpha / r."""
        return (self.alpha or 2.0 * self.rank) / self.rank

    def lora(self, rank: int) -> Lora:
        """Additions of any rank on this scale, which does not depend on the device."""
        return Lora(rank, self.scale * rank, _TARGETS[self.targets])

    def adapt(self, spec: Spec) -> Spec:
        """Add A and B beside every target."""
        return replace(spec, lora=self.lora(self.rank))


@dataclass(frozen=True)
class FedLora(LowRank, Added):
    """y = W x + (alpha / r) B A x with W frozen; A and B are averaged separately.

    **Source:** Hu et al., ICLR 2022, section 4.1; federated as in FedIT (Zhang et al., ICASSP 2024), section 3.
    **Departs:** the head trains too by default, as in every method here; norms and biases stay frozen. Averaging A and
    B apart is biased, mean(B) mean(A) != mean(B A); that is the method as it is used.
    """

    source: ClassVar[str] = "Hu et al. 2022; Zhang et al. 2024"
    cuts: ClassVar[str] = "training of the weights themselves"
    note: ClassVar[str] = (
        "Saves gradients and optimizer states, but hardly any activations, which dominate in small networks."
    )

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """A and B of the last t blocks, and the head; A and B that no device ever trains are not held."""
        layout = model.layout(spec)
        for trained in self.depths(layout):
            names = self.added(layout, trained, "lora") | self.head(layout)
            yield Plan(self.held(layout, "lora"), names, label="low rank, " + suffix_label(trained, layout.blocks))


@dataclass(frozen=True)
class LoraLastT(FedLora):
    """LoRA in the last t blocks, as many as fit each device: the fair rival of training the last t blocks themselves.

    **Source:** the rule of `lora` (Hu et al. 2022; Zhang et al. 2024) on the plans of arXiv 2411.07826.
    **Departs:** A and B of blocks that a device does not train stay as the server has them; the others average.
    """

    depth: Literal["all", "budget"] | int = "budget"

    cuts: ClassVar[str] = "training of the weights themselves, and of the first blocks"
    note: ClassVar[str] = "Activations, gradients and optimizer states of the last t blocks only, those of A and B."


@dataclass(frozen=True)
class FfaLora(FedLora):
    """LoRA with A frozen at its first random value: B alone trains, and mean(B) A = mean(B A) is exact.

    **Source:** Sun, Li, Li and Ding, ICLR 2024, section 4.
    **Departs:** the head trains too by default. A comes down once, although a seed would do.
    """

    source: ClassVar[str] = "Sun et al. 2024"
    cuts: ClassVar[str] = "training of the weights themselves and of half of what is added"
    note: ClassVar[str] = "As lora; besides, the inputs of linear layers need not be kept for gradients of A."

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """B of the last t blocks, and the head."""
        for plan in super().plans(spec, turn, memory):
            frozen = {f"{linear}.lora_a" for linear in linears(plan.trains)}
            yield replace(plan, trains=plan.trains - frozen)


@dataclass(frozen=True)
class Ranked(FedLora):
    """What methods share that give devices as many ranks as they can afford.

    Attributes:
        ranks: Those on offer, largest first; empty: `rank` and its halves down to 1.
    """

    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        falling = list(self.ranks) == sorted(set(self.ranks), reverse=True)
        if not falling or not all(1 <= rank <= self.rank for rank in self.ranks):
            raise ValueError(f"ranks must fall and be from 1 to rank = {self.rank}, got {self.ranks}")

    def offered(self, most: int) -> list[int]:
        """Ranks that a device with at most so many may get, largest first."""
        halves = (self.rank >> power for power in range(self.rank.bit_length()))
        return sorted({min(rank, most) for rank in self.ranks or halves}, reverse=True)


@dataclass(frozen=True)
class HetLora(Ranked):
    """Each device trains the first r_c ranks, and prunes its last ones; the mean is weighted by the size of B A.

    A device gets the first r_c rows of A and columns of B. To its loss is added
    lambda sum |B_tail|_F |A_tail|_F over linears, the tail being the ranks from max(1, floor(gamma r_c)) on. If that
    sum shrinks in a round, the tail is dropped, and that is the most ranks the device gets from then on. The server
    pads with zeros and takes, for each linear, the mean over all that sent some of it, device c counting
    |B_c A_c|_F = sqrt(tr((B_c' B_c) (A_c A_c'))); if all are zero, as usual. The head is averaged as usual.

    **Source:** Cho, Liu, Xu, Fahrezi and Joshi, EMNLP 2024 (HetLoRA), section 3.
    **Departs:** the scale is alpha / r_max for all, so that cutting ranks leaves the others alone. A dropped tail is
    sent as zeros in its round, since the size of an upload is agreed before. Pruning counts all linears together, as
    all have one rank, and each linear has its own weights in the mean. `absent` speaks of the head alone. Where
    memory differs from round to round, what is pruned are the ranks of the round, so a short one may cost some for
    good.

    Attributes:
        gamma: Share of the ranks that are not in the tail; 1 never prunes.
        lambda_: Weight of the penalty.
    """

    gamma: float = 0.99
    lambda_: float = 5e-3

    source: ClassVar[str] = "Cho et al. 2024"
    cuts: ClassVar[str] = "training of the weights themselves, and the rank of what is added"
    note: ClassVar[str] = "As lora: the rank hardly changes the peak, so a device short of memory is not helped."
    lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}")
        if self.lambda_ < 0:
            raise ValueError(f"lambda_ must not be negative, got {self.lambda_}")

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """The most ranks of each device."""
        return {"ranks": torch.full((len(fleet.class_of),), self.rank)}

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """All that LoRA trains, in fewer and fewer ranks."""
        most = int(memory["ranks"][turn.device]) if memory and turn.device >= 0 else self.rank
        for plan in super().plans(spec, turn, memory):
            for rank in self.offered(most):
                yield replace(plan, keep={_RANK: Keep(rank)}, label=plan.label.replace("low rank", f"rank {rank}"))

    def remember(self, job: Job, params: Mapping[str, Tensor], ops: Ops) -> Params:
        """What the penalty is before training."""
        return {"penalty": ops.tensor(np.array([self._penalty(job.plan, params, ops)]))}

    def pull(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> None:
        """d/dB |B||A| = (|A| / |B|) B on the tail, and likewise for A; nothing where a norm is zero."""
        first = self._first(job.plan)
        for b, a, norm_b, norm_a in self._tails(job.plan, params, ops):
            if norm_b and norm_a:
                ops.pull_tail(b, -1, first, self.lambda_ * norm_a / norm_b)
                ops.pull_tail(a, 0, first, self.lambda_ * norm_b / norm_a)

    def finish(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> tuple[Params, Params]:
        """The tail is zero if it shrank."""
        if self._penalty(job.plan, params, ops) < aside["penalty"].item():
            first = self._first(job.plan)
            for b, a, _, _ in self._tails(job.plan, params, ops):
                for p, dim in ((b, -1), (a, 0)):
                    ops.tail(p, dim, first).zero_()
        return super().finish(job, params, aside, ops)

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """The mean with zeros for missing ranks, weighted by size; ranks of devices that dropped some."""
        layout = model.layout(spec)
        votes = list(votes)
        after, _ = super().merge(params, spec, votes, turn, memory)
        for linear in linears(layout.params):
            voters = [vote for vote in votes if f"{linear}.lora_a" in vote.arrays]
            sizes = [product_norm(vote.arrays, linear) for vote in voters]
            weights = sizes if any(sizes) else [vote.weight for vote in voters]
            for name in (f"{linear}.lora_a", f"{linear}.lora_b") if voters else ():
                total = torch.zeros(layout.shape(name), dtype=torch.float64)
                for vote, weight in zip(voters, weights, strict=True):
                    total[vote.plan.index(layout, name)] += weight * vote.arrays[name].double()
                after[name] = (total / math.fsum(weights)).to(params[name].dtype)
        ranks = memory["ranks"].clone()
        for vote in votes:
            first = self._first(vote.plan)
            tails = [vote.arrays[f"{linear}.lora_a"][first:] for linear in linears(vote.arrays)]
            if first < vote.plan.keep[_RANK].count and not any(tail.any() for tail in tails):
                ranks[vote.device] = first
        return after, {"ranks": ranks}

    def _first(self, plan: Plan) -> int:
        """Where the tail begins."""
        return max(1, math.floor(self.gamma * plan.keep[_RANK].count))

    def _tails(
        self, plan: Plan, params: Mapping[str, Tensor], ops: Ops
    ) -> Iterator[tuple[Tensor, Tensor, float, float]]:
        """B and A of each linear there is, and the norms of their tails."""
        first = self._first(plan)
        for linear in linears(params) if first < plan.keep[_RANK].count else ():
            b, a = params[f"{linear}.lora_b"], params[f"{linear}.lora_a"]
            if f"{linear}.lora_a" in plan.trains:
                norm_b, norm_a = (ops.norm_of([ops.tail(p, dim, first)]).item() for p, dim in ((b, -1), (a, 0)))
                yield b, a, float(norm_b), float(norm_a)

    def _penalty(self, plan: Plan, params: Mapping[str, Tensor], ops: Ops) -> float:
        return math.fsum(norm_b * norm_a for _, _, norm_b, norm_a in self._tails(plan, params, ops))


def linears(names: Iterable[str]) -> list[str]:
    """Linear layers that have a low-rank addition among these tensors."""
    return [name.removesuffix(".lora_a") for name in names if name.endswith(".lora_a")]


def product_norm(arrays: Mapping[str, Tensor], linear: str) -> float:
    """|B A|_F = sqrt(tr((B' B) (A A'))), without the product itself."""
    a, b = arrays[f"{linear}.lora_a"].double().flatten(1), arrays[f"{linear}.lora_b"].double().flatten(0, -2)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
