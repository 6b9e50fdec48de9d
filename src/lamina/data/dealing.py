"""Who gets which example: the keys of [task] that the tasks share, and the dealing they ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np

from lamina.data import split
from lamina.errors import UserError
from lamina.turn import generator

SPLITS = ("natural", "iid", "dirichlet", "dirichlet-unequal", "shards", "quantity", "resource")
DEALT_DEVICES = 100  # devices of a split that pools the examples, where `devices` does not say


@dataclass(frozen=True, slots=True)
class Dealt:
    """Who has which example.

    Attributes:
        train: Training examples of each device, int64 [examples of the device].
        test: Test examples of each device, int64 [examples of the device]; may be empty.
        names: Name of each device: its user, or "device 7".
    """

    train: list[np.ndarray]
    test: list[np.ndarray]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Dealing:
    """How examples are dealt to devices; the base of the tables of [task] whose examples can be dealt.

    The test examples of a device follow the mix of labels that it trains on, and are as many as of any other, or, where
    devices differ in training examples, in proportion to these; each is dealt once. With split "natural" they
    are the user's own.

    Attributes:
        split: Who gets which example. "natural": a device is a user. The others pool all examples and deal them
            anew (`lamina.data.split`). "iid": at random. "dirichlet": devices of equal size with skewed labels.
            "dirichlet-unequal": skewed labels, and sizes as they come. "shards": a few labels per device.
            "quantity": at random, but devices differ in size. "resource": labels depend on the resource class
            of the device.
        devices: With split "natural" that many users are drawn by the seed, None: all; otherwise the number of
            devices, None: 100.
        alpha: Concentration of the "dirichlet", "dirichlet-unequal", "quantity" and "resource" splits; small is
            uneven.
        classes_per_device: Shards of a device of split "shards", each of one label or little more.
        min_examples: Training examples that every device has at least: those with fewer take theirs from the
            largest. With split "natural", users with fewer are left out.

    Raises:
        UserError: A field is out of range.
    """

    split: Literal["natural", "iid", "dirichlet", "dirichlet-unequal", "shards", "quantity", "resource"] = "iid"
    devices: int | None = None
    alpha: float = 0.3
    classes_per_device: int = 2
    min_examples: int = 1

    def __post_init__(self) -> None:
        """Refuse fields that are out of range."""
        demand("split", self.split, self.split in SPLITS, f"one of {', '.join(SPLITS)}")
        demand("devices", self.devices, self.devices is None or self.devices >= 1, "at least 1")
        demand("alpha", self.alpha, isfinite(self.alpha) and self.alpha > 0, "finite and above 0")
        demand("classes_per_device", self.classes_per_device, self.classes_per_device >= 1, "at least 1")
        demand("min_examples", self.min_examples, self.min_examples >= 1, "at least 1")

    def count_devices(self, users: Sequence[str] | None = None) -> int:
        """Number of devices that `deal` gives.

        Args:
            users: Whose each training example is; used where split "natural" takes all users.

        Raises:
            UserError: They are needed and not there, or none has enough examples.
        """
        if self.devices is not None:
            return self.devices
        return len(self._users(users)) if self.split == "natural" else DEALT_DEVICES

    def deal(
        self,
        labels: np.ndarray,
        test_labels: np.ndarray,
        seed: int,
        groups: Sequence[int] | None = None,
        users: Sequence[str] | None = None,
        test_users: Sequence[str] | None = None,
    ) -> Dealt:
        """Every example to a device.

        Args:
            labels: Label of every training example, from 0, integers [training examples].
            test_labels: Of every test example, [test examples].
            seed: Decides which users are drawn and who gets what; the same seed gives the same.
            groups: Resource class of every device, [devices], from 0; used by split "resource" alone.
            users: Whose each training example is, for split "natural".
            test_users: Whose each test example is; None: split "natural" deals them as the other splits do. Those
                of users who are no device go to nobody.

        Returns:
            Who has which example: each training and test example once, but with split "natural".

        Raises:
            UserError: There are too few examples or users for the devices, or `users` or `groups` do not fit.
        """
        if self.split == "natural":
            names = self._drawn(self._users(users), seed)
            train = split.natural(users or (), names)
        else:
            names = tuple(f"device {device}" for device in range(self.count_devices()))
            self._refuse_too_few(len(labels))
            train = self._parts(labels, seed, groups)
            train = split.at_least(train, self.min_examples, generator(seed, "task", "minimum"))
        if self.split == "natural" and test_users is not None:
            return Dealt(train, split.natural(test_users, names), names)
        count = 1 + max(int(part.max()) for part in (labels, test_labels) if len(part))
        counts = split.mixes(labels, train, count).T
        return Dealt(train, split.following(test_labels, counts, generator(seed, "task", "test")), names)

    def _parts(self, labels: np.ndarray, seed: int, groups: Sequence[int] | None) -> list[np.ndarray]:
        """Training examples of each device, before the minimum."""
        devices, rng = self.count_devices(), generator(seed, "task", "train")
        if self.split == "iid":
            return split.iid(len(labels), devices, rng)
        if self.split == "shards":
            return split.shards(labels, devices, self.classes_per_device, rng)
        if self.split == "resource":
            groups = self._checked(groups, devices)
            return split.resource_correlated(labels, groups, self._shares(labels, max(groups) + 1, seed), rng)
        if self.split == "quantity":
            labels = np.zeros_like(labels)
        shares = self._shares(labels, devices, seed)
        return (split.dirichlet if self.split == "dirichlet" else split.unequal)(labels, shares, rng)

    def _shares(self, labels: np.ndarray, columns: int, seed: int) -> np.ndarray:
        """Share of each label per device or resource class, float64 [labels, columns]."""
        return split.proportions(int(labels.max()) + 1, columns, self.alpha, generator(seed, "task", "shares"))

    def _checked(self, groups: Sequence[int] | None, devices: int) -> Sequence[int]:
        """The resource classes of the devices, or a UserError."""
        if groups is None or len(groups) != devices or min(groups) < 0:
            got = "none" if groups is None else f"{len(groups)}, the smallest {min(groups, default=None)}"
            raise UserError(
                f'task.split = "resource" needs the resource class, from 0, of each of the {devices} devices; got {got}'
            )
        return groups

    def _users(self, users: Sequence[str] | None) -> list[str]:
        """The users with enough training examples, in the order of their names."""
        if users is None:
            raise UserError(
                'task.split = "natural" needs to know whose each example is, and this data does not say; take'
                f" another split: {', '.join(SPLITS[1:])}"
            )
        counts = Counter(users)
        kept = sorted(user for user, count in counts.items() if count >= self.min_examples)
        if not kept:
            raise UserError(
                f"no user has task.min_examples = {self.min_examples} training examples: the most any has is"
                f" {max(counts.values(), default=0)}"
            )
        return kept

    def _drawn(self, users: list[str], seed: int) -> tuple[str, ...]:
        """As many users as `devices` says, drawn by the seed, in the order of their names."""
        if self.devices is None:
            return tuple(users)
        if self.devices > len(users):
            raise UserError(
                f"task.devices must be at most {len(users)}, the users with task.min_examples = {self.min_examples}"
                f" training examples or more; got {self.devices}"
            )
        rows = generator(seed, "task", "users").choice(len(users), self.devices, replace=False)
        return tuple(users[row] for row in sorted(rows))

    def _refuse_too_few(self, examples: int) -> None:
        """Raise a UserError unless there is enough for every device."""
        devices = self.count_devices()
        if examples < devices * self.min_examples:
            raise UserError(
                f"{devices} devices with task.min_examples = {self.min_examples} take"
                f" {devices * self.min_examples} training examples; there are {examples}; lower task.devices or"
                " task.min_examples"
            )


def held_out(strata: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A share of every stratum, rounded to the nearest number, but never all of it.

    Args:
        strata: Stratum of every example, from 0, integers [examples].
        fraction: The share.
        rng: Decides which examples; how many does not depend on it.

    Returns:
        Examples in ascending order, int64 [held out].
    """
    sizes = np.bincount(strata)
    takes = np.minimum(np.floor(sizes * fraction + 0.5).astype(np.int64), sizes - 1)
    order = rng.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]  # stratum by stratum, shuffled within
    places = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[places < np.repeat(takes, sizes)])


def demand(field: str, value: object, holds: bool, rule: str) -> None:
    """Raise a UserError that names the field of [task] unless the rule holds."""
    if not holds:
        raise UserError(f"task.{field} must be {rule}, got {value!r}")
