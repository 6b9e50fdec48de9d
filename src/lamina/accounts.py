"""The books of a client that runs on shapes: what lives when, what is kept for backward, and operations."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar, cast
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from lamina import optim
from lamina.job import Local
from lamina.ops import Ops
from lamina.shapes import FLOAT_BYTES, Allocation, Node, Shape, as_shape
from lamina.stand_ins import Cache, Optimizer
from lamina.timeline import Timeline

T = TypeVar("T")


class Accounts(Ops):
    """Kernels that are not computed but booked. What each of them makes and keeps, `lamina.ledger.Ledger` knows.

    Attributes:
        timeline: What lives when.
        saved_bytes: Kept for backward passes, all together. A storage kept twice counts once.
        flops: Of forward and backward, by moment.
        round_examples: Different examples that the device uses in a round.
        warm: Whether the optimizer has its states from the beginning: a step that is not the first.
        cached: Whether outputs of the frozen prefix were cached.
    """

    def __init__(self, round_examples: int, warm: bool = False) -> None:
        """Open empty accounts."""
        super().__init__()
        self.timeline = Timeline()
        self.saved_bytes = 0
        self.flops: defaultdict[str, Fraction] = defaultdict(Fraction)
        self.round_examples, self.warm = round_examples, warm
        self.cached, self._times = False, Fraction(1)
        self._optimizers: WeakSet[Optimizer] = WeakSet()

    def new(self, size_bytes: int, category: str = "temporary") -> Allocation:
        """Allocate."""
        return Allocation(self.timeline, size_bytes, category)

    def blank(self, shape: Sequence[int], item_bytes: int = FLOAT_BYTES, category: str = "temporary") -> Tensor:
        """A shape of its own, without a graph."""
        return cast(Tensor, Shape(tuple(shape), self.new(item_bytes * math.prod(shape), category)))

    def compute(self, call: Callable[[], Tensor], shape: Sequence[int], scratch: int = 0, flops: int = 0) -> Tensor:
        """As it says."""
        besides = self.new(FLOAT_BYTES * scratch)
        out = self.blank(shape)
        del besides
        self._count(flops)
        return out

    def moment(self, name: str) -> None:
        """What comes is booked under this name."""
        self.timeline.moment = name

    def examples(self, rows: np.ndarray) -> np.ndarray:
        """As many as in the whole round."""
        return np.arange(self.round_examples)

    def slices(self, count: int, size: int) -> Iterator[slice]:
        """The first, the second for all that are like it, and the last."""
        first, *others = super().slices(count, size)
        yield first
        if others[:-1]:
            self._times *= len(others) - 1
            yield others[0]
            self._times /= len(others) - 1
        yield from others[-1:]

    def drawn(self, networks: Sequence[T], index: int) -> Iterator[T]:
        """Each of them in a step of its own, with its share of the operations."""
        self._times /= len(networks)
        for network in networks:
            for optimizer in self._optimizers:
                optimizer.reset()
            yield network
        self._times *= len(networks)

    def cache(self, rows: int, shape: tuple[int, ...], place: str, bits: int) -> Any:
        """Memory for all examples of the round if they are kept in it; reading makes a copy."""
        self.cached = True
        return Cache(self, rows, shape, place, bits // 8)

    def optimizer(self, rated: Mapping[float, Sequence[Tensor]], local: Local, kind: optim.Kind) -> Any:
        """States are born in the first step."""
        made = Optimizer(self, [as_shape(p) for params in rated.values() for p in params], kind)
        self._optimizers.add(made)
        return made

    def _count(self, operations: int) -> None:
        self.flops[self.timeline.moment] += self._times * operations

    def _products(self, x: Tensor, weight: Tensor, numel: int = 0) -> None:
        graph = torch.is_grad_enabled()
        products = 1 + graph * ((as_shape(x).node is not None) + (as_shape(weight).node is not None))
        self._count(products * 2 * (x.numel() // x.shape[-1]) * (numel or weight.numel()))

    def _unpacked(self, weight: Tensor) -> Tensor | None:
        return self.blank(weight.shape) if as_shape(weight).packed else None

    def _out(
        self,
        shape: Sequence[int],
        sources: Sequence[Tensor],
        kept: Sequence[Tensor],
        scratch: int = 0,
        aliases: int = 0,
    ) -> Tensor:
        """A new tensor; the gradients of the first `aliases` sources are the memory of its own gradient."""
        out = as_shape(self.blank(shape))
        edges = [(as_shape(s).node, FLOAT_BYTES * s.numel() if i >= aliases else None) for i, s in enumerate(sources)]
        inputs: list[tuple[Node, int | Allocation | None]] = [(node, size) for node, size in edges if node]
        if inputs and torch.is_grad_enabled():
            out.node = Node(inputs=inputs, scratch_bytes=scratch)
            self._keep(out.node, kept)
        return cast(Tensor, out)

    def _keep(self, node: Node, kept: Sequence[Tensor]) -> None:
        """Let a node hold on to what it needs; parameters are there anyway."""
        for each in kept:
            memory = as_shape(each).memory
            if memory.storage.category == "weights":
                continue
            if memory.storage.category == "temporary":
                memory.storage.category = "activations"
                self.saved_bytes += memory.storage.size_bytes
            node.saved.append(memory)
