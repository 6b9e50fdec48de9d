"""Frozen matrices in 16 or 8 bits, unpacked for each product and never kept unpacked for backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 4096
"""Tensors with fewer elements stay as they are: their scales and their errors would cost more than they save."""
_HALF_MOST = torch.finfo(torch.float16).max
SLAB_ROWS = 1024
"""Rows of a head that are unpacked at a time."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A frozen matrix, stored small.

    8 bits: symmetric, x = round(x / s) s with s = max|x| / 127 per row, a row being all but the last dimension (per
    output channel, or finer). Only what `lamina.model` does with a weight is there: shape, flattening to a matrix.

    Attributes:
        data: float16 or int8, of the full shape.
        scale: float32 [..., 1], for int8.
        shape: As the model sees it.
    """

    data: Tensor
    scale: Tensor | None
    shape: torch.Size

    def numel(self) -> int:
        """Number of elements."""
        return self.data.numel()

    def reshape(self, *sizes: int) -> Packed:
        """The same memory seen in another shape."""
        rows = self.numel() // sizes[-1] if len(sizes) == 2 and sizes[0] == -1 else sizes[0]
        return Packed(self.data, self.scale, torch.Size((rows, self.numel() // rows)))

    def flatten(self, start: int) -> Packed:
        """As a matrix: the dimensions from `start` on as one."""
        return self.reshape(self.shape[:start].numel(), -1)

    def leading(self, sizes: Sequence[int]) -> Packed:
        """The first so many indices of every dimension, in the same memory."""
        cut = tuple(map(slice, sizes))
        return Packed(self.data[cut], None if self.scale is None else self.scale[cut[:-1]], torch.Size(sizes))

    def detach(self) -> Packed:
        """As it is: it has no gradient."""
        return self

    def unpack(self) -> Tensor:
        """In fp32, new memory."""
        return _unpack(self.data, self.scale).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows in fp32: an embedding lookup."""
        return _unpack(self.data[indices], None if self.scale is None else self.scale[indices])


def packable(shape: Sequence[int], bits: int) -> bool:
    """Whether a frozen tensor of this shape is packed; small ones and vectors stay as they are."""
    return bits < 32 and len(shape) > 1 and math.prod(shape) >= SMALLEST


def pack(shape: Sequence[int], bits: int, read: Callable[[range], Tensor], device: torch.device) -> Packed:
    """A frozen tensor in `bits` bits, which `read` gives a few rows at a time, so that it is never whole in fp32."""
    data = torch.empty(shape, dtype=torch.float16 if bits == 16 else torch.int8, device=device)
    scale = torch.empty(*shape[:-1], 1, device=device) if bits == 8 else None
    for start in range(0, shape[0], SLAB_ROWS):
        rows = range(start, min(start + SLAB_ROWS, shape[0]))
        x = read(rows)
        if scale is not None:
            part = scale[rows.start : rows.stop]
            torch.amax(x.abs(), -1, keepdim=True, out=part)
            x = (x / part.div_(127).clamp_(min=torch.finfo(torch.float32).tiny)).round_()
        data[rows.start : rows.stop] = x if scale is not None else x.clamp_(-_HALF_MOST, _HALF_MOST)
        del x
    return Packed(data, scale, data.shape)


def unpacked(p: Tensor | Packed) -> Tensor:
    """A tensor as it is, or in new memory if it was packed."""
    return p.unpack() if isinstance(p, Packed) else p


def slabs(weight: Tensor | Packed) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix with what they hold in fp32: all at once, or, where it is packed, a slab at a time."""
    if isinstance(weight, Tensor):
        yield slice(0, len(weight)), weight
        return
    for start in range(0, weight.shape[0], SLAB_ROWS):
        rows = slice(start, min(start + SLAB_ROWS, weight.shape[0]))
        part = _unpack(weight.data[rows], None if weight.scale is None else weight.scale[rows])
        yield rows, part.flatten(1)
        del part


class PackedLinear(torch.autograd.Function):
    """X W^T + b with a packed W; backward unpacks again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """Keeps the packed matrix."""
        ctx.weight = weight
        return F.linear(x, weight.unpack(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Gradients of x and b."""
        of_x = gradient @ ctx.weight.unpack() if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias


def _unpack(data: Tensor, scale: Tensor | None) -> Tensor:
    return data.float() if scale is None else data.float().mul_(scale)
