"""What crosses between the server and a device, and how a device trains. All of it is plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from lamina.layout import Layout, Params
from lamina.optim import Kind
from lamina.plan import Plan
from lamina.turn import generator

if TYPE_CHECKING:
    from lamina.methods.base import Method


MOST_EXAMPLES, MOST_EPOCHS = 100_000_000, 1_000_000
"""Of a device in a round; the rows of all its steps are drawn beforehand."""


def _plain() -> Method:
    from lamina.methods.base import Method

    return Method()


@dataclass(frozen=True)
class Local:
    """How every device trains in a round: the `[local]` table.

    Devices are stateless: the optimizer starts anew in every round.

    Attributes:
        optimizer: "sgd", "adamw", "adamw8" (states in 8 bits) or "adafactor"; see `lamina.optim`.
        lr: Learning rate of the first round.
        head_lr: The same, of the head and of what exits add, which are new on most tasks; as `lr` if 0.
        schedule: "constant", or "cosine": down to lr / 10 over the rounds of the run (Pfeiffer et al. 2023, SLT).
        momentum: Of SGD.
        weight_decay: Applied to what is trained, never to what is frozen.
        batch_size: Sequences per step; at most 100 million in all steps of a round.
        steps: Steps per round, running through the shard epoch after epoch with full batches; 0: as `epochs` says.
        epochs: Passes over the shard where `steps` is 0, the last batch of each as small as it comes; at most 1e6.
        clip: Largest norm of the whole gradient; none if 0.
    """

    lr: float = 1e-3
    head_lr: float = 0.0
    optimizer: Literal["sgd", "adamw", "adamw8", "adafactor"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 32
    steps: int = 0
    epochs: int = 1
    clip: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f'momentum goes with optimizer = "sgd", got {self.optimizer!r}')
        for key in ("head_lr", "weight_decay", "clip", "steps"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        for key in ("batch_size", "epochs"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if (examples := self.batch_size * max(1, self.steps)) > MOST_EXAMPLES:
            raise ValueError(f"batch_size times steps must be at most {MOST_EXAMPLES}, got {examples}")
        if self.epochs > MOST_EPOCHS:
            raise ValueError(f"epochs must be at most {MOST_EPOCHS}, got {self.epochs}")

    @property
    def kind(self) -> Kind:
        """The optimizer, SGD with momentum told from SGD without."""
        return "momentum" if self.momentum else self.optimizer

    def round_steps(self, examples: int) -> int:
        """Steps of one round on a shard of so many examples."""
        return self.steps or self.epochs * math.ceil(examples / self.batch_size)

    def round_lr(self, turn: Turn, head: bool = False) -> float:
        """Learning rate of a round, of the head or of all else."""
        first = self.head_lr if head and self.head_lr else self.lr
        if self.schedule == "constant" or turn.rounds == 1:
            return first
        done = turn.round / (turn.rounds - 1)
        return first * (0.55 + 0.45 * math.cos(math.pi * done))

    def rated(self, turn: Turn, layout: Layout, params: Mapping[str, Tensor]) -> dict[float, list[Tensor]]:
        """Trained tensors by the learning rate they have in a round."""
        found: dict[float, list[Tensor]] = {}
        for name, p in params.items():
            rate = self.round_lr(turn, layout.params[name].part in ("head", "exit"))
            found.setdefault(rate, []).append(p)
        return found

    def batches(self, turn: Turn, examples: int) -> list[np.ndarray]:
        """Rows of the shard for each step of a round: a new seeded shuffle per epoch."""
        rng = turn.rng("batches")
        if not self.steps:
            epochs = [rng.permutation(examples) for _ in range(self.epochs)]
            return [rows[i : i + self.batch_size] for rows in epochs for i in range(0, examples, self.batch_size)]
        wanted = self.steps * self.batch_size
        rows = np.concatenate([rng.permutation(examples) for _ in range(math.ceil(wanted / examples))])
        return list(rows[:wanted].reshape(self.steps, self.batch_size))


@dataclass(frozen=True, slots=True)
class Turn:
    """One device in one round: the key of everything random.

    Attributes:
        seed: Of the run.
        round: Index of the round.
        rounds: Number of rounds of the run.
        device: Stable index of the device; -1 for the server.
    """

    seed: int
    round: int
    rounds: int
    device: int = -1

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator that depends on (seed, round, device, purpose) alone."""
        return generator(self.seed, self.round, self.device, purpose)


@dataclass(frozen=True)
class Job:
    """Server -> device: train this.

    Attributes:
        turn: Who and when.
        plan: What to hold and train.
        local: How.
        arrays: The held tensors, at the shapes of the plan: in memory, or on the device's disk (`lamina.flash`). They
            are the device's own: it trains them in place.
        method: Whose rules the device follows while it trains.
        state: What the device kept for the method from its last round; empty at first, and for most methods always.
    """

    turn: Turn
    plan: Plan
    local: Local
    arrays: Mapping[str, Tensor]
    method: Method = field(default_factory=_plain)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def owned(self) -> Job:
        """The same job with copies of what the device will change; the frozen tensors stay shared."""
        copies = {name: self.arrays[name].clone() for name in self.plan.trains}
        return replace(self, arrays={**self.arrays, **copies})


@dataclass(frozen=True)
class Update:
    """Device -> server: what came out.

    Attributes:
        turn: Of the job.
        arrays: What the device sends: by default new values of exactly the tensors the plan trains.
        examples: Size of the device's shard.
        steps: Optimizer steps taken.
        loss: Mean training loss over the steps, in nats.
        state: What the device keeps for its next round. It is not sent; a simulation keeps it in its place.
    """

    turn: Turn
    arrays: Params
    examples: int
    steps: int
    loss: float
    state: Params = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Device -> server: nothing came out.

    Attributes:
        turn: Of the job.
        reason: In a few words.
    """

    turn: Turn
    reason: str
