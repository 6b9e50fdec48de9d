"""Shapes in the place of tensors: memory that lives as long as names hold it, and a graph to replay backward on."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import cast

from torch import Tensor

from lamina.timeline import Storage, Timeline

FLOAT_BYTES, INDEX_BYTES = 4, 8


class Allocation:
    """Memory in a timeline, from when this is made until nothing refers to it."""

    def __init__(self, timeline: Timeline, size_bytes: int, category: str = "temporary") -> None:
        """Be born."""
        self.timeline, self.storage = timeline, Storage(size_bytes, category)
        timeline.born(self.storage)

    def __del__(self) -> None:
        """Be freed."""
        self.timeline.died(self.storage)


@dataclass(eq=False, slots=True)
class Node:
    """A step of the backward pass, or a leaf, where gradients come to rest.

    Attributes:
        order: Nodes made later go first.
        saved: Kept until the step is done.
        inputs: Where gradients go, and in which memory: new, of so many bytes; or given; or, where None, that of the
            gradient that came in.
        scratch_bytes: Needed while the step runs.
        leaf: Category of the gradient of a leaf; None for a step.
        grad: That gradient.
        summed: Whether it is of this backward pass alone, so that a second part of it makes a new sum.
    """

    order: int = field(default_factory=count(1).__next__)
    saved: list[Allocation] = field(default_factory=list)
    inputs: list[tuple[Node, int | Allocation | None]] = field(default_factory=list)
    scratch_bytes: int = 0
    leaf: str | None = None
    grad: Allocation | None = None
    summed: bool = False

    def rest(self, part: Allocation) -> None:
        """A gradient, or a part of it, comes to this leaf; it is added in place to what earlier passes left here."""
        if self.grad and not self.summed:
            return
        self.grad = Allocation(part.timeline, part.storage.size_bytes) if self.grad else part
        self.summed = True
        self.grad.storage.category = cast(str, self.leaf)


@dataclass(eq=False, slots=True)
class Shape:
    """Stands for a tensor, with as much of its interface as the model and the client use.

    Attributes:
        shape: Its sizes.
        memory: What it lives in; views share it.
        node: Where its gradient goes; None if it needs none.
        packed: Whether it is a `lamina.packed.Packed`.
    """

    shape: tuple[int, ...]
    memory: Allocation
    node: Node | None = None
    packed: bool = False

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        """Size of the first dimension."""
        return self.shape[0]

    def reshape(self, *shape: int) -> Shape:
        """A view."""
        known = math.prod(size for size in shape if size != -1)
        sizes = tuple(self.numel() // known if size == -1 else size for size in shape)
        return Shape(sizes, self.memory, self.node, self.packed)

    def flatten(self, start: int) -> Shape:
        """A view with the dimensions from `start` on as one."""
        return self.reshape(*self.shape[:start], math.prod(self.shape[start:]))

    def __getitem__(self, rows: slice) -> Shape:
        """A view of some rows."""
        return Shape((len(range(*rows.indices(len(self)))), *self.shape[1:]), self.memory)

    def __setitem__(self, rows: slice, value: Shape) -> None:
        """Nothing to do: memory that is there is written."""

    def add_(self, other: Shape, alpha: float = 1.0) -> Shape:
        """In place."""
        return self

    def detach(self) -> Shape:
        """The same memory without a graph."""
        return Shape(self.shape, self.memory)

    @property
    def requires_grad(self) -> bool:
        """Whether it has a gradient."""
        return self.node is not None

    def requires_grad_(self, needed: bool = True) -> Shape:
        """Make it a leaf, or not."""
        category = "gradients" if self.memory.storage.category == "weights" else "temporary"
        self.node = Node(leaf=category) if needed else None
        return self

    @property
    def grad(self) -> Shape | None:
        """The gradient that came to rest here."""
        found = self.node.grad if self.node else None
        return Shape(self.shape, found) if found else None

    def backward(self, gradient: Shape | None = None) -> None:
        """Go through the graph behind it: gradients are born and merged, and what was kept for them is freed."""
        assert self.node
        new = partial(Allocation, self.memory.timeline)
        arrived = {self.node: new(FLOAT_BYTES) if gradient is None else gradient.memory}
        waiting = [(-self.node.order, self.node)]
        leaves: list[Node] = []
        while waiting:
            node = heapq.heappop(waiting)[1]
            incoming = arrived.pop(node)
            scratch = new(node.scratch_bytes) if node.scratch_bytes else None
            outgoing = [
                (to, incoming if memory is None else new(memory) if isinstance(memory, int) else memory)
                for to, memory in node.inputs
            ]
            del scratch
            node.saved.clear()
            node.inputs.clear()
            del incoming
            while outgoing:
                to, part = outgoing.pop()
                if to.leaf:
                    to.rest(part)
                    leaves.append(to)
                elif to in arrived:
                    arrived[to] = new(part.storage.size_bytes)
                else:
                    arrived[to] = part
                    heapq.heappush(waiting, (-to.order, to))
                del part
        for leaf in leaves:
            leaf.summed = False

    def item(self) -> float:
        """A number."""
        return 0.0


def as_shape(tensor: Tensor) -> Shape:
    """What stands for it."""
    return cast(Shape, tensor)
