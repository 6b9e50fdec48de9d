"""Methods that train without a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from lamina import model
from lamina.job import Turn
from lamina.layout import Params
from lamina.methods.lora import LowRank
from lamina.plan import Plan
from lamina.spec import Spec


@dataclass(frozen=True)
class Spry(LowRank):
    """LoRA by forward mode: g = mean_i (v_i . dL) v_i from forward passes alone; devices share the blocks out.

    A device perturbs A and B of `blocks` blocks only, so that a direction has few dimensions; the next devices, and the
    same device in the next round, those that follow. The server takes the mean over those that trained a block.

    **Source:** Panchal, Parikh, Choudhary, Zhang, Brun and Guan, NeurIPS 2024 (SPRY), Algorithm 1, weights sent once
    per round.
    **Departs:** layers go by the number of device and round, (device + 1 + round) blocks on, and not by the place in
    the cohort, which a device need not know; A and B of a block stay together. The server takes the mean instead of a
    step of FedYogi. A head over the vocabulary is not replaced here, so it stays as it was pretrained (`train_head`).

    Attributes:
        blocks: Whose A and B a device trains in a round; 0: of all.
        train_head: Whether every device trains the head as well. One that classifies, which may be new, trains always.
    """

    rank: int = 1
    targets: Literal["all", "qv"] = "qv"
    blocks: int = 1
    train_head: bool = False

    group: ClassVar[str] = "no backward"
    source: ClassVar[str] = "Panchal et al. 2024"
    cuts: ClassVar[str] = "backward; training of the weights themselves"
    note: ClassVar[str] = (
        "No activations are kept, so far less than backward through LoRA as it is. But all weights are held, and a "
        "pass on dual numbers takes twice what an inference takes: hardly less than backward through the last block "
        "(CAFF with t = 1). With all levers LoRA takes hardly more, for what is left are the weights, and CAFF less."
    )

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.blocks < 0:
            raise ValueError(f"blocks must not be negative, got {self.blocks}")

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """One: of all shares of a round, that with the lowest block, which any device may get, is the dearest."""
        layout = model.layout(spec)
        count, head = min(self.blocks or spec.blocks, spec.blocks), self.train_head or bool(spec.labels)
        mine = {(count * (turn.device + 1 + turn.round) + i) % spec.blocks for i in range(count)}
        names = frozenset(
            name
            for name, row in layout.params.items()
            if (row.part == "lora" and row.block in mine) or (head and row.part == "head")
        )
        blocks = ", ".join(str(block + 1) for block in sorted(mine))
        yield Plan(frozenset(layout.params), names, label=f"low rank, block {blocks}", gradient="forward")


@dataclass(frozen=True)
class Mezo(LowRank):
    """SGD from two losses per direction: p -= lr g z, g = (L(p + e z) - L(p - e z)) / 2e; only the numbers g go up.

    Directions z are functions of seed, round, device and step, so the server draws them anew and repeats the steps.

    **Source:** Malladi, Gao, Nichani, Damian, Lee, Chen and Arora, NeurIPS 2023 (MeZO), Algorithms 1 and 2; with
    numbers as upload as in FedKSeed (Qin et al., ICML 2024), section 3.
    **Departs:** directions are new in every step, where FedKSeed draws from K seeds so that the download is small too;
    here a device receives the tensors. The learning rate is given times the number of trained scalars (`zeroth_lr`).

    Attributes:
        trains: "lora", with the head where it classifies, which may be new; "all" the network; or the "head" with the
            norm before it.
    """

    rank: int = 1
    targets: Literal["all", "qv"] = "qv"
    trains: Literal["lora", "all", "head"] = "lora"

    group: ClassVar[str] = "no backward"
    source: ClassVar[str] = "Malladi et al. 2023; Qin et al. 2024"
    cuts: ClassVar[str] = "backward; what is sent"
    note: ClassVar[str] = (
        "All weights and what an inference takes, whatever trains: no gradients, optimizer states or activations. That "
        "is less than backward through the last block (CAFF with t = 1) as it is; with all levers, both are small, and "
        "CAFF takes less, for its frozen weights are then not held (nor are they if only the head trains here)."
    )

    def adapt(self, spec: Spec) -> Spec:
        """Add A and B where they train."""
        return super().adapt(spec) if self.trains == "lora" else spec

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """One."""
        layout = model.layout(spec)
        names = frozenset(layout.params)
        tail, parts = layout.tail(0), ("lora", "head") if spec.labels else ("lora",)
        lora = frozenset(name for name, row in layout.params.items() if row.part in parts)
        trains, label = {"lora": (lora, "low rank"), "all": (names, "all"), "head": (tail, "head")}[self.trains]
        yield Plan(names, trains, label=f"{label} {spec.blocks}, two losses", gradient="zeroth")
