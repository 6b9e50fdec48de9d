"""Fed2: parts of the upper blocks that are for some classes each, and devices that hold some of these parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from lamina import model
from lamina.job import Turn
from lamina.layout import Axis, Params
from lamina.methods.base import Method
from lamina.plan import Keep, Plan
from lamina.spec import Groups, Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet


@dataclass(frozen=True)
class Fed2(Method):
    """The upper blocks are split in groups, each with classes of its own; a group is averaged over those that hold it.

    Heads, feed-forward units and classes are dealt to G groups, neighbours together. Below, the network is one. Then
    its residual stream is copied, once for each group; heads and units of a group see and change its stream alone, and
    the logits of its classes come from that alone. So a logit has no gradient in another group. A device holds the
    groups of which it has examples, or of these the k with the most examples, as its budget allows, and trains all that
    it holds. Group g, and its rows of the head, become the mean over the devices that held g, by examples; what is
    not in a group, the mean over all.

    **Source:** Yu, Zhang, Qin, Xu, Wang, Liu, Tian and Chen, KDD 2021 (arXiv 2111.14248): structure-feature allocation
    with decoupled logits, and feature paired averaging.
    **Departs:** the paper cuts convolutions with their channels; a residual stream cut in G would leave little of a
    pretrained network, so each group has a whole one. Each pretrained head and unit is used, but sees less than before:
    the network starts worse than it was. Norms, the biases that are added to the stream, and a dense layer before
    the head are the same for all groups and trained by all; the paper has group norms of each group's own. The paper
    finds the depth at which groups begin from how much features vary; here it is `shared`. All devices of the paper
    hold what they need for their classes, whatever it takes; here budgets take groups away. Logits of classes that are
    not held are 0 in training, so that a device learns from all of its examples. A device tells the server once how
    many examples of each class it has.

    Attributes:
        groups: G; a network with fewer heads (of keys) or classes has as many as it has of these.
        shared: Share of the blocks, from the bottom, that are not split; the last one always is.
    """

    groups: int = 4
    shared: float = 0.5

    group: ClassVar[str] = "width"
    source: ClassVar[str] = "Yu et al. 2021"
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    cuts: ClassVar[str] = "heads and feed-forward units of the upper blocks, by class"
    note: ClassVar[str] = (
        "Upper blocks with all groups take more than uncut ones, since each group has a residual stream; with one "
        "group, the less the more groups there are. What is below them is held and trained by all."
    )

    def __post_init__(self) -> None:
        """Refuse splits that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.groups < 2:
            raise ValueError(f"groups must be at least 2, got {self.groups}")
        if not 0 <= self.shared < 1:
            raise ValueError(f"shared must be in [0, 1), got {self.shared}")

    def adapt(self, spec: Spec) -> Spec:
        """With all groups."""
        count = min(self.groups, spec.kv_heads or spec.heads, spec.labels)
        return replace(spec, groups=Groups(count, int(self.shared * spec.blocks), tuple(range(count))))

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """Examples that each device has of the classes of each group, int64 [devices, groups]."""
        assert spec.groups
        if fleet.mix is None:
            return {}
        starts = [part.start for part in spec.groups.parts(spec.labels)]
        return {"examples": torch.from_numpy(np.add.reduceat(fleet.mix, starts, axis=1))}

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """Groups of which the device has examples, one fewer each time; any device has examples of all."""
        assert spec.groups
        found = list(spec.groups.held)
        if memory and turn.device >= 0:
            examples = memory["examples"][turn.device].tolist()
            found = sorted((group for group in found if examples[group]), key=lambda group: -examples[group])
        for count in range(len(found), 0, -1):
            yield self._plan(spec, tuple(sorted(found[:count])))

    def _plan(self, spec: Spec, held: tuple[int, ...]) -> Plan:
        """All tensors, cut to some groups."""
        assert spec.groups
        layout, groups = model.layout(spec), replace(spec.groups, held=held)
        names, label = frozenset(layout.params), f"{len(held)} of {groups.count} groups"
        if held == spec.groups.held:
            return Plan(names, names, label=label)
        axes = [Axis(f"h.{i}.{part}") for i in range(groups.first_block, spec.blocks) for part in ("heads", "ffn")]
        units = {axis: tuple(chain(*groups.parts(layout.sizes[axis]))) for axis in (*axes, spec.output_axis)}
        keep = {axis: Keep(len(found), units=found) for axis, found in units.items()}
        return Plan(names, names, keep, label, network=replace(spec, groups=groups))
