"""The slice algebra: which part of a network a device gets, cutting it out, and putting it back.

The laws (tested in `tests/test_plan.py`):
    identity   narrowing and merging without training changes nothing, bit for bit
    FedAvg     when every device trains everything, the merge is the weighted mean
    silence    no scalar outside `trains` x `keep` of some device moves, bit for bit
    order      votes are summed in ascending device order: the order in which updates arrive cannot matter
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lamina.layout import Axis, Layout, Params
from lamina.levers import Levers
from lamina.spec import Spec, spec_from_json

Absent = Literal["keep", "skip"]
Gradient = Literal["backward", "forward", "zeroth"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


@dataclass(frozen=True, slots=True)
class Keep:
    """The units kept of one axis: `count` of them from `start` on, wrapping around, or exactly `units`."""

    count: int
    start: int = 0
    units: tuple[int, ...] | None = None

    def indices(self, size: int) -> Tensor:
        """Kept indices of an axis of `size`, int64 [count]."""
        if self.units is not None:
            return torch.tensor(self.units, dtype=torch.int64)
        return (torch.arange(self.count) + self.start) % size


@dataclass(frozen=True)
class Plan:
    """What one device holds, trains and uploads in one round.

    Attributes:
        holds: Names of the tensors on the device.
        trains: Those with gradients: exactly what is uploaded.
        keep: Axes of which only some units are held; every tensor with that axis is cut alike.
        label: For people: "last 3 of 12".
        levers: How it saves memory meanwhile. What the method sets is its own; the rest is the planner's choice.
        network: What the device runs, where it is not simply the server's network, cut: its tensors may be made from
            the server's (low-rank factors, say), or be used otherwise. `holds`, `trains` and `keep` then speak of this
            network.
        gradient: How it is found: by a "backward" pass, by a "forward" pass along a direction (Baydin et al. 2022), or
            from two losses ("zeroth" order; Spall 1992).
    """

    holds: frozenset[str]
    trains: frozenset[str]
    keep: Mapping[Axis, Keep] = field(default_factory=dict, hash=False)
    label: str = ""
    levers: Levers = field(default_factory=Levers)
    network: Spec | None = None
    gradient: Gradient = "backward"

    def __post_init__(self) -> None:
        """Refuse a plan that trains what is not held."""
        if missing := sorted(self.trains - self.holds):
            raise ValueError(f"plan {self.label!r} trains tensors it does not hold: {', '.join(missing[:3])}")

    def runs(self, spec: Spec) -> Spec:
        """The device's network, where the server's is `spec`."""
        return self.network or spec

    def shape(self, layout: Layout, name: str) -> tuple[int, ...]:
        """Shape of a tensor on the device."""
        axes = layout.params[name].axes
        return tuple(self.keep[axis].count if axis in self.keep else layout.sizes[axis] for axis in axes)

    def index(self, layout: Layout, name: str) -> tuple[Tensor, ...] | None:
        """Index tensors that select the device's part of a full tensor, or None when that is all of it."""
        axes = layout.params[name].axes
        if not any(axis in self.keep for axis in axes):
            return None
        whole = [Keep(layout.sizes[axis]) for axis in axes]
        kept = [self.keep.get(axis, all_of) for axis, all_of in zip(axes, whole, strict=True)]
        picks = [keep.indices(layout.sizes[axis]) for axis, keep in zip(axes, kept, strict=True)]
        return tuple(pick.reshape([-1 if i == j else 1 for j in range(len(axes))]) for i, pick in enumerate(picks))

    def trained_blocks(self, layout: Layout) -> int:
        """Number of blocks in which anything is trained: `t` in the papers."""
        return len(self.blocks(layout))

    def blocks(self, layout: Layout) -> tuple[int, ...]:
        """Indices of those blocks, ascending."""
        return tuple(sorted({block for name in self.trains if (block := layout.params[name].block) is not None}))

    def first_trained(self, layout: Layout) -> int:
        """Index of the lowest block the gradient must reach; 0 if the input side trains, `blocks` if only the head.

        An exit comes after its block.
        """
        rows = [layout.params[name] for name in self.trains]
        if any(row.part == "embed" for row in rows):
            return 0
        reached = (row.block + (row.part == "exit") for row in rows if row.block is not None)
        return min(reached, default=layout.blocks)

    def below(self, layout: Layout) -> frozenset[str]:
        """Names of what is held below the lowest trained block: the frozen prefix; empty if the embedding trains."""
        first = self.first_trained(layout)
        rows = ((name, layout.params[name]) for name in self.holds)
        names = frozenset(
            name
            for name, row in rows
            if row.part == "embed" or (row.block is not None and row.block < first and row.part != "exit")
        )
        return frozenset() if names & self.trains else names

    def caches(self, layout: Layout) -> bool:
        """Whether the outputs of the frozen prefix are kept: the lever is on and there is a prefix."""
        return bool(self.levers.prefix_cache and self.below(layout))

    def bare(self, spec: Spec) -> Plan:
        """A plan of the same price for all that differ in which units or blocks they keep, but not in how many."""
        keep = {axis: Keep(kept.count) for axis, kept in self.keep.items()}
        plan = replace(self, keep=keep, label="")
        found = sorted({int(name.split(".")[1]) for name in self.holds if name.startswith("h.")})
        if spec.exits or self.network or found == list(range(len(found))):
            return plan
        place = {f"h.{block}": f"h.{i}" for i, block in enumerate(found)}

        def moved(name: str) -> str:
            block = ".".join(name.split(".")[:2])
            return place[block] + name.removeprefix(block) if block in place else name

        return replace(
            plan,
            holds=frozenset(map(moved, self.holds)),
            trains=frozenset(map(moved, self.trains)),
            keep={Axis(moved(axis)): kept for axis, kept in keep.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives the same plan back."""
        keep = {axis: [k.count, k.start, list(k.units) if k.units else None] for axis, k in self.keep.items()}
        return {
            "holds": sorted(self.holds),
            "trains": sorted(self.trains),
            "keep": keep,
            "label": self.label,
            "levers": asdict(self.levers),
            "network": asdict(self.network) if self.network else None,
            "gradient": self.gradient,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The plan written by `to_json`."""
        keep = {
            Axis(axis): Keep(count, start, tuple(units) if units else None)
            for axis, (count, start, units) in data["keep"].items()
        }
        return Plan(
            frozenset(data["holds"]),
            frozenset(data["trains"]),
            keep,
            data["label"],
            Levers(**data["levers"]),
            spec_from_json(data["network"]) if data["network"] else None,
            data["gradient"],
        )


def narrow(params: Params, layout: Layout, plan: Plan) -> Params:
    """The device's tensors, cut out of the full ones, in layout order. Uncut tensors are shared, not copied."""
    device: Params = {}
    for name in layout.params:
        if name in plan.holds:
            index = plan.index(layout, name)
            device[name] = params[name] if index is None else params[name][index]
    return device


@dataclass(frozen=True)
class Vote:
    """What one device says about the tensors it trained: their new values, and how much it counts."""

    device: int
    plan: Plan
    arrays: Params
    weight: float


class Overlap:
    """Overlap mean, vote by vote: each scalar becomes the weighted mean over the devices that trained it.

    Devices that took part but did not train a scalar stay silent ("skip", as in HeteroFL: the mean is over those that
    trained it) or vote for the old value ("keep": the mean is over all participants; Pfeiffer et al. 2023, CoCoFL,
    Algorithm 2). Where nobody trained, nothing moves. FedAvg is the case in which all trained all.

    Sums are float64 and are made in ascending device order, so that the order of arrival cannot matter. Nothing is kept
    of a vote but them.
    """

    def __init__(self, params: Params, layout: Layout, absent: Absent) -> None:
        """Begin without a vote.

        Args:
            params: The global tensors before the round.
            layout: Their layout.
            absent: What a device that did not train a scalar says about it.
        """
        self._params, self._layout, self._absent = params, layout, absent
        self._total, self._last = 0.0, -1
        self._sums: dict[str, _Sum] = {}

    def add(self, vote: Vote) -> None:
        """Count a vote.

        Raises:
            ValueError: It is of a device below that of the last one.
        """
        if vote.device < self._last:
            raise ValueError(f"votes come in ascending order of devices; {vote.device} came after {self._last}")
        self._last = vote.device
        self._total += vote.weight
        for name in vote.plan.trains:
            found = self._sums.get(name)
            if found is None:
                found = self._sums[name] = _Sum(self._params[name])
            found.add(vote.arrays[name], vote.weight, vote.plan.index(self._layout, name))

    def mean(self) -> Params:
        """All global tensors: new ones where anything was trained, the others the same objects as before."""
        total = self._total if self._absent == "keep" else None
        return self._params | {
            name: self._sums[name].mean(old, total) for name, old in self._params.items() if name in self._sums
        }


def merge(params: Params, layout: Layout, votes: Iterable[Vote], absent: Absent) -> Params:
    """The overlap mean of votes that come one by one, in ascending device order; see `Overlap`.

    Raises:
        ValueError: They come in another order.
    """
    overlap = Overlap(params, layout, absent)
    for vote in votes:
        overlap.add(vote)
    return overlap.mean()


class _Sum:
    """The weighted sum of one tensor over those that trained it, and of their weights."""

    def __init__(self, old: Tensor) -> None:
        self._sums = torch.full(old.shape, -0.0, dtype=torch.float64)  # -0.0 + x is x for every x, -0.0 included
        self._weights: Tensor | float = 0.0  # a number while nobody cut it

    def add(self, array: Tensor, weight: float, index: tuple[Tensor, ...] | None) -> None:
        value = array.double() * weight
        if index is None:
            self._sums += value
            self._weights += weight
            return
        if isinstance(self._weights, float):
            self._weights = torch.full_like(self._sums, self._weights)
        self._sums[index] += value
        self._weights[index] += weight

    def mean(self, old: Tensor, total: float | None) -> Tensor:
        """With `total`, the weight that is missing there votes for `old`."""
        weights = torch.as_tensor(self._weights, dtype=torch.float64)
        sums = self._sums if total is None else self._sums.add(old.double() * (total - weights))
        mean = sums / (weights if total is None else total)
        return torch.where(weights > 0, mean.to(old.dtype), old)
