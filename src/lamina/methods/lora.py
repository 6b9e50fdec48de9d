"""Methods that add low-rank matrices and train those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from lamina import model
from lamina.job import Turn
from lamina.layout import Params
from lamina.methods.base import Method, suffix_label
from lamina.model import LINEARS, Lora, Spec
from lamina.plan import Plan

_TARGETS = {"all": LINEARS, "qv": ("attn.q", "attn.v")}


@dataclass(frozen=True)
class FedLora(Method):
    """y = W x + (alpha / r) B A x with W frozen; A and B are averaged separately.

    **Source:** Hu et al., ICLR 2022, section 4.1; federated as in FedIT (Zhang et al., ICASSP 2024), section 3.
    **Departs:** the head trains too by default, as in every method here; norms and biases stay frozen. Averaging A and
    B apart is biased, mean(B) mean(A) != mean(B A); that is the method as it is used.

    Attributes:
        rank: r.
        alpha: Numerator of the scale; 2 r if 0.
        targets: "all" six linears of a block, or "qv".
        depth: "all" blocks, "budget" (the last t, as many as fit each device), or a number (the last so many).
        train_head: Whether the head trains.
    """

    rank: int = 8
    alpha: float = 0.0
    targets: Literal["all", "qv"] = "all"
    depth: Literal["all", "budget"] | int = "all"
    train_head: bool = True

    group: ClassVar[str] = "added"
    source: ClassVar[str] = "Hu et al. 2022; Zhang et al. 2024"
    cuts: ClassVar[str] = "training of the weights themselves"
    note: ClassVar[str] = (
        "Saves gradients and optimizer states, but hardly any activations, which dominate in small networks."
    )

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        if isinstance(self.depth, int) and self.depth < 1:
            raise ValueError(f'depth must be "all", "budget" or a number from 1 on, got {self.depth}')

    def adapt(self, spec: Spec) -> Spec:
        """Add A and B beside every target."""
        return replace(spec, lora=Lora(self.rank, self.alpha or 2.0 * self.rank, _TARGETS[self.targets]))

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """A and B of the last t blocks, and the head; A and B that no device ever trains are not held."""
        layout = model.layout(spec)
        deepest = min(self.depth, layout.blocks) if isinstance(self.depth, int) else layout.blocks
        shallowest = 1 if self.depth == "budget" else deepest
        added = {name for name, row in layout.params.items() if row.part == "lora"}
        holds = frozenset(layout.params) - (added - layout.tail(deepest))
        for trained in range(deepest, shallowest - 1, -1):
            tail = layout.tail(trained)
            names = frozenset(
                name for name in tail if name in added or (self.train_head and layout.params[name].part == "head")
            )
            yield Plan(holds, names, label="low rank, " + suffix_label(trained, layout.blocks))
