"""Methods that choose which blocks to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lamina import model
from lamina.job import Turn
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods.base import Method, suffix_label
from lamina.methods.lora import FedLora
from lamina.plan import Absent, Plan, Vote
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet


@dataclass(frozen=True)
class Caff(Method):
    """Each device trains the last t blocks and the head; the rest is frozen; the server averages block by block.

    t*_c(n) is the largest t whose price on network n fits device c; the network is argmax_n mean_c t*_c(n).

    **Source:** Constraint-aware federated finetuning, arXiv 2411.07826 (CAFF).
    **Departs:** where the sources are silent: final norm and head train with the suffix (`train_head`); the embeddings
    train only where every block does (`train_embeddings`); among networks of equal mean t the deepest is taken. The
    averaging has two readings, `absent`; "keep" is what the authors' CoCoFL does (Pfeiffer et al. 2023, Algorithm 2).

    Attributes:
        train_head: Whether the final norm and the head train.
        train_embeddings: Whether a device that trains all blocks also trains the input side.
    """

    absent: Absent = "keep"
    train_head: bool = True
    train_embeddings: bool = True

    group: ClassVar[str] = "blocks"
    source: ClassVar[str] = "arXiv 2411.07826"
    cuts: ClassVar[str] = "training of the first blocks"
    note: ClassVar[str] = (
        "Gradients, optimizer states and activations of the last t blocks only; the frozen weights are still held."
    )

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """The last t blocks, for t from all of them down to one."""
        layout = model.layout(spec)
        holds = frozenset(layout.params)
        for trained in range(layout.blocks, 0, -1):
            names = layout.tail(trained)
            if not self.train_head:
                names -= layout.tail(0)
            if not self.train_embeddings:
                names = frozenset(name for name in names if layout.params[name].part != "embed")
            yield Plan(holds, names, label=suffix_label(trained, layout.blocks))


@cache
def _units(spec: Spec) -> tuple[tuple[str, ...], ...]:
    """Names of the tensors of the embeddings, of each block, and of the final norm with the head."""
    layout = model.layout(spec)
    units: list[list[str]] = [[] for _ in range(layout.blocks + 2)]
    for name, row in layout.params.items():
        above = 0 if row.part == "embed" else layout.blocks + 1
        units[above if row.block is None else row.block + 1].append(name)
    return tuple(map(tuple, units))


@dataclass(frozen=True)
class CocoFl(Method):
    """Each device trains a run of neighbouring units, drawn anew every round; what is frozen is held in few bits.

    Units are the embeddings, the blocks, and the final norm with the head. Of the runs of units that fit a device,
    those within another one that fits are left out, and one of the others is drawn, each as likely. A device that did
    not train a unit votes for its old value: with r the weight of those that did, W <- r mean(W_c) + (1 - r) W.

    **Source:** Pfeiffer, Rapp, Khalili and Henkel, TMLR 2023 (CoCoFL); the mean is Algorithm 2.
    **Departs:** in 8 bits are the frozen matrices alone, a scale per row, made anew from the global ones in every
    round; their products, the norms and the activations stay in fp32, where the paper computes in integers, so here
    freezing saves memory but no time beyond that of the backward pass. Runs are priced by the ruler of all methods
    instead of measured tables. Where a device has to stand for its class, in tables and for the choice of the network,
    it has the longest run. Devices count by their examples; the authors' code counts them all alike (`weighting`).

    Attributes:
        frozen_bits: Of frozen matrices: 8, or 16 or 32 to leave that part of the method out.
    """

    absent: Absent = "keep"
    frozen_bits: Literal[8, 16, 32] = 8

    group: ClassVar[str] = "blocks"
    source: ClassVar[str] = "Pfeiffer et al. 2023"
    cuts: ClassVar[str] = "training of all but a run of neighbouring units; bits of what is frozen"
    note: ClassVar[str] = (
        "Frozen weights take a quarter. Activations are kept from the lowest trained unit upward, so only runs near "
        "the head save them; a run at the input saves little but upload."
    )

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """All runs, by the number of elements, of equal ones the lowest first."""
        yield from _runs(spec, self.frozen_bits).values()

    def fitting(self, spec: Spec, turn: Turn, memory: Params, fits: Callable[[Plan], Plan | None]) -> Iterator[Plan]:
        """Those that are part of no other; as what is within a run that fits does too, about two questions a unit."""
        runs, units, end = _runs(spec, self.frozen_bits), spec.blocks + 2, 0
        if found := fits(runs[0, units]):
            yield found
            return
        for first in range(units):
            longest, end = None, max(end, first)
            while end < units and (found := fits(runs[first, end + 1])):
                longest, end = found, end + 1
            if longest:
                yield longest

    def pick(self, feasible: Iterator[Plan], turn: Turn) -> Plan | None:
        """One of them; for device -1, which stands for any, the one with most tensors."""
        runs = list(feasible)
        if turn.device < 0:
            return max(runs, key=lambda plan: len(plan.trains), default=None)
        return runs[int(turn.rng("run").integers(len(runs)))] if runs else None


@cache
def _runs(spec: Spec, frozen_bits: Literal[8, 16, 32]) -> Mapping[tuple[int, int], Plan]:
    """First unit and the one after the last -> plan."""
    units, blocks, layout = _units(spec), spec.blocks, model.layout(spec)
    names = ["embeddings", *(f"block {i}" for i in range(blocks)), "head"]
    holds, top = frozenset(chain(*units)), len(units)
    sizes = [sum(map(layout.numel, unit)) for unit in units]
    runs = [(first, end) for first in range(top) for end in range(first + 1, top + 1)]
    runs.sort(key=lambda run: (-sum(sizes[slice(*run)]), run))
    made = {(0, top): Plan(holds, holds, label=suffix_label(blocks, blocks))}  # nothing is frozen
    for first, end in runs[1:]:
        label = f"{' to '.join(dict.fromkeys((names[first], names[end - 1])))} of {blocks}"
        trains = frozenset(chain(*units[first:end]))
        made[first, end] = Plan(holds, trains, label=label, levers=Levers(frozen_bits=frozen_bits))
    return made


@dataclass(frozen=True)
class Alf(Method):
    """Training begins with the whole network and stops, from the input on, where the updates no longer lead anywhere.

    With D_k the change of unit k (the embeddings, or a block) in a round, the server follows
        S_k <- b S_k + D_k,   A_k <- b A_k + |D_k|,   E_k = |S_k| / A_k in [0, 1],
    the effective perturbation: 1 where all updates agree, and sqrt((1 - b) / (1 + b)) where each goes its own way. The
    lowest unit that still trains is frozen for good once E_k was below the threshold for some judgements in a row. The
    last block and the head never are. What is frozen is neither trained, nor sent by devices, nor sent to them again.

    **Source:** Malan, Peluso, Calimera, Macii and Montuschi, IEEE Internet of Things Journal 11(4), 2024 (ALF); the
    measure of stability as in Chen, Xu, Wang, Li, Li, Chen and Zhang, ICDCS 2021 (APF), there of single scalars.
    **Departs:** only the abstract of the paper was at hand; all constants are choices made here. The order from the
    input on is enforced, so that memory and operations fall too, and not traffic alone.

    Attributes:
        threshold: Of E_k. The default is just above the 0.23 that updates without a common direction have.
        patience: Judgements in a row below it.
        min_rounds: Rounds before anything is frozen.
        decay: b, with a judgement after every round.
        window: If not 0, b is 1 and the sums start anew every so many rounds, with a judgement at the end of each;
            updates without a common direction then have 1 / sqrt(window).
        depth: "all": every device trains all that is not frozen yet; "budget": the last blocks of it, as many as fit.
    """

    threshold: float = 0.3
    patience: int = 3
    min_rounds: int = 10
    decay: float = 0.9
    window: int = 0
    depth: Literal["all", "budget"] = "all"

    group: ClassVar[str] = "blocks"
    source: ClassVar[str] = "Malan et al. 2024"
    cuts: ClassVar[str] = "training of the first blocks, more of them as rounds go by"
    note: ClassVar[str] = (
        "Begins with all of full training and takes less only later: a budget must hold the peak of the first rounds, "
        'unless depth = "budget".'
    )

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        for key, least in (("patience", 1), ("min_rounds", 0), ("window", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """Empty sums of all that can be frozen, int64 and float64 [units] beside them, and two numbers."""
        units = _units(spec)[:-2]
        return {f"sum.{name}": torch.zeros_like(params[name]) for name in chain(*units)} | {
            "travel": torch.zeros(len(units), dtype=torch.float64),
            "calm": torch.zeros(len(units), dtype=torch.int64),
            "rounds": torch.tensor(0),
            "frozen": torch.tensor(0),
        }

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """All that is not frozen yet; with `depth = "budget"` then also fewer of the last blocks of it."""
        layout, frozen = model.layout(spec), int(memory["frozen"]) if memory else 0
        fixed = frozenset(chain(*_units(spec)[:frozen]))
        most = layout.blocks - max(0, frozen - 1)
        for trained in range(most, 0 if self.depth == "budget" else most - 1, -1):
            label = suffix_label(trained, layout.blocks)
            yield Plan(frozenset(layout.params), layout.tail(trained) - fixed, label=label)

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """The overlap mean; then every unit that moved is judged."""
        after, _ = super().merge(params, spec, votes, turn, memory)
        rounds, frozen = int(memory["rounds"]) + 1, int(memory["frozen"])
        fade = self.decay if not self.window else float(rounds % self.window != 1 % self.window)
        calm, travel = memory["calm"].clone(), fade * memory["travel"]
        sums: Params = {}
        for k, names in list(enumerate(_units(spec)[:-2]))[frozen:]:
            steps = {name: after[name] - params[name] for name in names}
            sums |= {f"sum.{name}": fade * memory[f"sum.{name}"] + step for name, step in steps.items()}
            travel[k] += _norm(steps.values())
            if any(after[name] is not params[name] for name in names) and not (self.window and rounds % self.window):
                perturbation = _norm(sums[f"sum.{name}"] for name in names) / travel[k]
                calm[k] = calm[k] + 1 if perturbation < self.threshold else 0
        if rounds >= self.min_rounds:
            frozen += next((i for i, count in enumerate(calm[frozen:]) if count < self.patience), len(calm) - frozen)
        for name in chain(*_units(spec)[:frozen]):
            sums.pop(f"sum.{name}", None)
        counts = {"travel": travel, "calm": calm, "rounds": torch.tensor(rounds), "frozen": torch.tensor(frozen)}
        return after, sums | counts


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all together, float64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


@dataclass(frozen=True)
class FedRa(Method):
    """Each device holds some blocks, drawn anew every round, skips the others, and trains low-rank matrices and head.

    A device holds n of the l blocks, as many as fit, every choice of n as likely; the residual stream passes from one
    to the next as if the others were not there. The A and B of a block become the mean over the devices that hold it.

    **Source:** Su, Li and Xue, ECCV 2024 (FedRA, arXiv 2311.11227), and the authors' code; low-rank matrices as in
    `lora`.
    **Departs:** every device draws for itself, and a block that nobody holds in a round stays as it is: so it is in the
    authors' code, where seeing to it that each block is held is an option, switched off. That code adapts the two
    output projections of a block and a learned prompt; here it is the same layers as in the other methods, no prompt.

    Attributes:
        rank: Of the low-rank matrices.
        alpha: Numerator of the scale; the rank if 0.
        targets: "all" linears of a block, or "qv".
        train_head: Whether the head trains.
    """

    weighting: Literal["examples", "uniform"] = "uniform"
    rank: int = 8
    alpha: float = 0.0
    targets: Literal["all", "qv"] = "all"
    train_head: bool = True

    group: ClassVar[str] = "blocks"
    source: ClassVar[str] = "Su et al. 2024"
    cuts: ClassVar[str] = "blocks, at random; training of the weights themselves"
    note: ClassVar[str] = "Weights, activations and operations fall with the number of blocks held."

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        _ = self._lora

    @property
    def _lora(self) -> FedLora:
        return FedLora(rank=self.rank, alpha=self.alpha or float(self.rank), targets=self.targets)

    def adapt(self, spec: Spec) -> Spec:
        """Add A and B beside every target."""
        return self._lora.adapt(spec)

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """All blocks, then one fewer at a time."""
        layout = model.layout(spec)
        order = turn.rng("blocks").permutation(layout.blocks).tolist()
        for count in range(layout.blocks, 0, -1):
            held = {None, *order[:count]}
            holds = frozenset(name for name, row in layout.params.items() if row.block in held)
            parts = ("lora", "head") if self.train_head else ("lora",)
            trains = frozenset(name for name in holds if layout.params[name].part in parts)
            yield Plan(holds, trains, label=f"low rank, {count} of {layout.blocks}, others skipped")
