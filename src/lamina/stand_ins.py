"""What stands for a device's arrays, examples, cache and optimizer while its price is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lamina import optim
from lamina.layout import Layout
from lamina.plan import Plan
from lamina.shapes import FLOAT_BYTES, Allocation, Shape
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.accounts import Accounts
    from lamina.job import Turn


@dataclass
class Held(Mapping[str, Tensor]):
    """Some arrays of a device: each access makes a new shape, as reading from disk makes a new tensor."""

    accounts: Accounts
    layout: Layout
    plan: Plan
    names: frozenset[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes on the device."""
        return self.plan.shape(self.layout, name)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that the device holds."""
        return self.accounts.blank(self.shape(name), category="weights")

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.names)


@dataclass
class Blank:
    """Examples of which the tokens are as different as can be, and texts as long as can be."""

    spec: Spec
    examples: int
    tokens: int

    def __len__(self) -> int:
        """Number of examples."""
        return self.examples

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, as any shard gives them to this network."""
        spec, count = self.spec, len(rows)
        labels = np.zeros((count, 1), np.int64)
        if spec.patch:
            return np.zeros((count, spec.channels, spec.image, spec.image), np.float32), labels
        ids = (np.arange(count * self.tokens) % spec.vocab).reshape(-1, self.tokens)
        return ids, labels if spec.labels else ids

    def at(self, turn: Turn) -> Blank:
        """The same in every turn."""
        return self


class Cache:
    """Stands for `flash.Kept` and `flash.Pages`."""

    def __init__(self, accounts: Accounts, rows: int, shape: tuple[int, ...], place: str, item_bytes: int) -> None:
        """Memory for the rows if they are kept in it."""
        self._accounts, self._shape, self._item_bytes = accounts, shape, item_bytes
        self._kept = accounts.blank((rows, *shape), item_bytes) if place == "ram" else None

    def write(self, first: int, x: Tensor) -> None:
        """A copy in fewer bits on its way to disk."""
        if self._kept is None and self._item_bytes < FLOAT_BYTES:
            self._accounts.blank(x.shape, self._item_bytes)

    def read(self, rows: np.ndarray, count: int | None = None) -> Tensor:
        """A copy."""
        size = self._shape if count is None else (count, *self._shape[1:])
        found = self._accounts.blank((len(rows), *size), self._item_bytes)
        return found if self._item_bytes == FLOAT_BYTES else self._accounts.blank(found.shape)


class Optimizer:
    """Stands for one of `lamina.optim`."""

    def __init__(self, accounts: Accounts, params: Sequence[Shape], kind: optim.Kind) -> None:
        """With its states from the beginning if the accounts are warm."""
        self._accounts, self._params, self._kind = accounts, params, kind
        self._states: Allocation | None = None
        if accounts.warm:
            self._begin()

    def reset(self) -> None:
        """Be as before the first step, where that is the one that stands for all."""
        if not self._accounts.warm:
            self._states = None

    def _begin(self) -> None:
        size = sum(optim.state_bytes(self._kind, p.shape) for p in self._params)
        self._states = self._accounts.new(size, "optimizer")

    def step(self) -> None:
        """States are born in the first."""
        if self._states is None:
            self._begin()
        self._accounts.new(max(optim.scratch_bytes(self._kind, p.shape) for p in self._params))

    def zero_grad(self) -> None:
        """Gradients die."""
        for p in self._params:
            if p.node:
                p.node.grad = None
