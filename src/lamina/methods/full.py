"""Methods that cut nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lamina import model
from lamina.job import Turn
from lamina.layout import Params
from lamina.methods.base import Method, suffix_label
from lamina.plan import Plan
from lamina.spec import Spec


@dataclass(frozen=True)
class FedAvg(Method):
    """Every device trains the whole network; the server takes the mean, W <- sum_c p_c W_c / sum_c p_c.

    `on_infeasible` gives the three variants of the literature: "reject" restricts the run to a network that every
    device can train, "drop" leaves out the devices that cannot, "ignore" is the upper bound without budgets.

    **Source:** McMahan, Moore, Ramage, Hampson and Aguera y Arcas, AISTATS 2017, Algorithm 1.
    **Departs:** the network is chosen by the rule all methods share (largest mean number of trained blocks).
    """

    group: ClassVar[str] = "full"
    source: ClassVar[str] = "McMahan et al. 2017"
    note: ClassVar[str] = "Weights, gradients, optimizer states and activations of the whole network."

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """One plan: everything."""
        names = frozenset(model.layout(spec).params)
        yield Plan(names, names, label=suffix_label(spec.blocks, spec.blocks))
