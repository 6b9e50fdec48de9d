"""What the rest of lamina sees of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Shard(Protocol):
    """The examples of one device."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the examples `rows`, int64 [rows, tokens] each."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Examples as two arrays, in memory or mapped from a file.

    Attributes:
        inputs: int64 [examples, tokens].
        targets: int64 [examples, tokens].
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.inputs)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the examples `rows`, int64 [rows, tokens] each."""
        return np.asarray(self.inputs[rows]), np.asarray(self.targets[rows])


@dataclass(frozen=True, slots=True)
class Task:
    """Everyone's data.

    Attributes:
        train: Training examples of each device.
        test: Test examples of each device.
        names: Name of each device: its role, or "device 7".
        scored: Positions at the end of a test example that count for the accuracy.
        digest: SHA-256 of the data and of who has what.
        kinds: What makes devices differ: names of classes, roles, users or documents.
        mix: Training examples of each kind that each device has, int64 [devices, kinds].
        labels: Names of the classes, in the order of the targets; () where the targets are tokens.
        notes: What people should be told of it, such as how many texts were cut.
    """

    train: Sequence[Shard]
    test: Sequence[Shard]
    names: Sequence[str]
    scored: int
    digest: str
    kinds: tuple[str, ...]
    mix: np.ndarray
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
