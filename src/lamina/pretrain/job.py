"""What to pretrain, and from what: what text and images share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lamina import model
from lamina.layout import Params
from lamina.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Pretrain(ABC):
    """What to pretrain; the fields of `PretrainText` or `PretrainImages` are the keys of `lamina pretrain`'s TOML file.

    Attributes:
        out: Folder that gets one network folder per depth, named `<name>-<depth>`.
        name: Name of the family.
        depths: Numbers of blocks, ascending.
        steps: Optimizer steps for each depth.
        embed: Width.
        heads: Attention heads.
        batch_size: Examples per step.
        lr: Peak learning rate of AdamW, for each depth; linear warm-up, then linear decay to zero.
        warmup: Warm-up steps.
        weight_decay: Decoupled decay of matrices; vectors are not decayed.
        clip: Largest norm of the whole gradient; none if 0.
        grow: Start each depth from the one before it.
        precision: "bf16" runs matrix products in bfloat16 (autocast); weights and optimizer stay fp32.
        device: "cpu", "cuda", or "auto".
        threads: Of the CPU; more than one changes the last bits.
        checkpoint_every: Steps between resumable states and validation points.
        seed: Of the initial weights and of the order of the examples.
    """

    source: ClassVar[str]  # the key that says what to learn from
    counts: ClassVar[tuple[str, ...]] = ("embed", "heads", "batch_size", "threads", "checkpoint_every")

    out: str
    name: str
    steps: tuple[int, ...]
    lr: tuple[float, ...]
    depths: tuple[int, ...] = (3, 6, 9, 12)
    embed: int = 96
    heads: int = 3
    batch_size: int = 32
    warmup: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    grow: bool = True
    precision: Literal["fp32", "bf16"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what types alone cannot.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ValueError(f"depths must be ascending positive integers, got {list(self.depths)}")
        for key in ("steps", "lr"):
            values = getattr(self, key)
            if len(values) != len(self.depths) or min(values) <= 0:
                raise ValueError(f"{key} needs one positive number per depth ({len(self.depths)}), got {list(values)}")
        for key in self.counts:
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("warmup", "weight_decay", "clip", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if self.embed % self.heads:
            raise ValueError(f"embed ({self.embed}) must be a multiple of heads ({self.heads})")

    def recipe(self, index: int) -> dict[str, object]:
        """All that the network of the depth at `index` depends on; of the shallower ones where it grew from them."""
        recipe = asdict(self)
        for key in ("depths", "steps", "lr"):
            recipe[key] = recipe[key][0 if self.grow else index : index + 1]
        recipe[self.source] = Path(recipe[self.source]).name
        return {key: value for key, value in recipe.items() if key not in ("out", "device", "threads")}

    @abstractmethod
    def read(self, device: torch.device) -> Material:
        """What to learn from, for training on that device.

        Raises:
            UserError: It is missing, damaged or too little.
        """


@dataclass(frozen=True)
class Progress:
    """One validation point.

    Attributes:
        depth: Of the network in training.
        step: Steps taken.
        steps: Of all.
        train_loss: Mean loss since the point before, in nats per character or image.
        val_loss: The same on validation examples.
    """

    depth: int
    step: int
    steps: int
    train_loss: float
    val_loss: float

    def told(self) -> str:
        """What else was measured, in words."""
        raise NotImplementedError


class Material(ABC):
    """What is learned from.

    Attributes:
        point: What a validation point is.
        unit: What is counted, in the plural.
        facts: What was read, for the recipe.
        batch_units: Units in a batch.
        val_units: Units in all validation examples.
    """

    point: ClassVar[type[Progress]]
    unit: ClassVar[str]
    facts: dict[str, object]
    batch_units: int
    val_units: int

    @abstractmethod
    def spec(self, depth: int) -> Spec:
        """Sizes of the network of one depth."""

    def init(self, spec: Spec, generator: torch.Generator) -> Params:
        """Fresh weights."""
        return model.init(spec, generator)

    @abstractmethod
    def batch(self, depth: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step of training: a function of the two numbers and of the job's seed."""

    @abstractmethod
    def validate(self, spec: Spec, params: Params, whole: bool) -> dict[str, float]:
        """Scores on the validation examples, by their names in `point`; unless `whole`, on some that stand for all."""

    @abstractmethod
    def write(self, folder: Path, spec: Spec, half: Params) -> None:
        """Write the network, 16-bit, as a Hugging Face folder."""


def logits(spec: Spec, params: Params, inputs: Tensor, precision: str) -> Tensor:
    """fp32 logits of the network, BSV, with matrix products as `precision` says."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model.forward(spec, params, inputs).float()
