"""What the rest of lamina sees of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, overload

import numpy as np

from lamina.files import digest

if TYPE_CHECKING:
    from lamina.job import Turn
    from lamina.spec import Spec

T = TypeVar("T")


class Shard(Protocol):
    """The examples of one device."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the examples `rows`.

        Causal text: ids and the ids that follow, int64 [rows, tokens] each. Texts with a label: ids, int64 [rows,
        tokens of the longest], -1 beyond the end of each, and labels, int64 [rows, 1]. Images: pixels, normalised,
        float32 [rows, channels, height, width], and labels, int64 [rows, 1].
        """

    def at(self, turn: Turn) -> Shard:
        """The examples as they are in that turn: images change from round to round, most others never."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Examples as two arrays, in memory or mapped from a file.

    Attributes:
        inputs: As in `Shard.batch`, of all examples.
        targets: The same.
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.inputs)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the examples `rows`."""
        return np.asarray(self.inputs[rows]), np.asarray(self.targets[rows])

    def at(self, turn: Turn) -> Pairs:
        """The same in every turn."""
        return self


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring examples of a shard.

    Attributes:
        whole: The shard.
        rows: Which of its examples.
    """

    whole: Shard
    rows: range

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the examples `rows`, counted from the first of the part."""
        return self.whole.batch(np.asarray(rows) + self.rows.start)

    def at(self, turn: Turn) -> Part:
        """The same part, as it is in that turn."""
        return replace(self, whole=self.whole.at(turn))


@dataclass(frozen=True, slots=True)
class Made(Sequence[T], Generic[T]):
    """A sequence whose items are made when they are asked for.

    Attributes:
        size: Number of items.
        make: The item of an index from 0 on.
    """

    size: int
    make: Callable[[int], T]

    def __len__(self) -> int:
        """Number of items."""
        return self.size

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """One item, or some."""
        places = range(self.size)[index]
        return self.make(places) if isinstance(places, int) else [self.make(place) for place in places]


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

    def validating(self, share: float) -> Task:
        """The last `share` of everyone's training examples in the place of the test examples.

        The number is rounded up, but everyone keeps a training example: who has a single one is not tested. `mix` stays
        that of all training examples. Where windows of text overlap, those at the cut do as well.
        """

        def cut(device: int, last: bool) -> Shard:
            count = len(self.train[device])
            at = max(min(count, 1), count - math.ceil(count * share))
            return Part(self.train[device], range(at, count) if last else range(at))

        return replace(
            self,
            train=Made(len(self.train), partial(cut, last=False)),
            test=Made(len(self.train), partial(cut, last=True)),
            digest=digest(f"{self.digest} validation {share!r}".encode()),
        )


class TaskTable(Protocol):
    """What a [task] table asks for: data, and how a network is to take it. The fields of its classes are its keys."""

    @property
    def path(self) -> str | None:
        """Where the data is; None: it comes with lamina."""

    @property
    def window(self) -> int:
        """Longest sequence in tokens; 0 for images."""

    def device_count(self) -> int:
        """Number of devices."""

    def fit(self, spec: Spec, folder: Path) -> Spec:
        """The network in `folder` as this task uses it; a UserError where it cannot."""

    def reads(self, folder: Path) -> str:
        """Digest of what turns data into inputs, by what a network's folder says."""

    def load(self, seed: int, groups: Sequence[int] | None, folder: Path) -> Task:
        """The data, for networks as that in `folder`; `groups` are the resource classes of the devices."""
