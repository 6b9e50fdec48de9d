"""Methods that choose which blocks to train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lamina import model
from lamina.job import Turn
from lamina.layout import Params
from lamina.methods.base import Method, suffix_label
from lamina.model import Spec
from lamina.plan import Absent, Plan


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
