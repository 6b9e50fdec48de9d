"""Names for every dimension of every tensor.

Two tensors that are added or multiplied share the axis name, so cutting an axis cuts both alike. A sub-model is then
nothing but a smaller dictionary of tensors, and a `Plan` (see `lamina.plan`) says which one a device gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NewType

if TYPE_CHECKING:
    from torch import Tensor

Axis = NewType("Axis", str)
Part = Literal["embed", "attn", "ffn", "norm", "head", "lora", "sparse", "adapter", "exit"]
Params = dict[str, "Tensor"]


@dataclass(frozen=True, slots=True)
class Param:
    """One row of a layout: the axes of a tensor, the part of the network it belongs to, and its block.

    Attributes:
        axes: One name per dimension.
        part: What the tensor is for. The role is a field, never a substring of the name.
        block: Index of the block it belongs to, or None outside the blocks.
    """

    axes: tuple[Axis, ...]
    part: Part
    block: int | None = None


@dataclass(frozen=True)
class Layout:
    """All tensors of a network by name, in their canonical order, and the size of every axis.

    Attributes:
        params: Name -> row, in the order in which everything iterates (merging, packing, files).
        sizes: Axis -> number of indices.
        blocks: Number of blocks, `l` in the papers.
    """

    params: Mapping[str, Param]
    sizes: Mapping[Axis, int]
    blocks: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self.sizes[axis] for axis in self.params[name].axes)

    def numel(self, name: str) -> int:
        """Number of elements of the full tensor."""
        return math.prod(self.shape(name))

    def tail(self, trained_blocks: int) -> frozenset[str]:
        """Names in the last `trained_blocks` blocks, the final norm and the head: what a suffix method can train.

        The input side (token and position embeddings) is included only when every block is, since training it sends
        the gradient through all blocks and gives back all the memory that freezing saved.
        """
        first = self.blocks - trained_blocks
        return frozenset(
            name
            for name, row in self.params.items()
            if (row.block is not None and row.block >= first)
            or (row.block is None and (row.part != "embed" or first == 0))
        )
