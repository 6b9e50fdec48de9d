"""The contract of a method: it lists plans, richest first, and never prices itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from lamina.job import Turn, Update
from lamina.layout import Layout
from lamina.model import Spec
from lamina.plan import Absent, Plan


@dataclass(frozen=True)
class Method:
    """Who holds what, who trains what, and how much each device counts.

    A method is a frozen dataclass; its fields are its hyperparameters and the keys of the `[method]` table.

    Attributes:
        absent: What a device that took part but did not train a scalar says about it: "skip" (nothing) or "keep" (the
            old value). See `lamina.plan.merge`.
        on_infeasible: When a device fits no plan of a network: "reject" the network, "drop" the device, or "ignore"
            all budgets, which gives an upper bound and not a run that the fleet could do.
        weighting: A device counts by its "examples", or all count the same ("uniform").
    """

    absent: Absent = "skip"
    on_infeasible: Literal["reject", "drop", "ignore"] = "reject"
    weighting: Literal["examples", "uniform"] = "examples"

    group: ClassVar[str]
    source: ClassVar[str]

    def adapt(self, spec: Spec) -> Spec:
        """The network with whatever the method adds to it; by default nothing."""
        return spec

    def plans(self, layout: Layout, turn: Turn) -> Iterator[Plan]:
        """The plans a device may get in a turn, richest first. The first that fits its budget is taken.

        Args:
            layout: Of the adapted network.
            turn: The device and the round, for methods that draw or rotate.

        Yields:
            Plans, each cheaper than the one before in at least one resource.
        """
        raise NotImplementedError

    def weight(self, update: Update) -> float:
        """How much an update counts in the merge."""
        return float(update.examples) if self.weighting == "examples" else 1.0


def suffix_label(trained: int, blocks: int) -> str:
    """For people: "last 3 of 12"."""
    return f"last {trained} of {blocks}" if trained < blocks else f"all {blocks}"
