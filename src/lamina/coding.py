"""Lossy coding of what a device sends, right on average: rotate, keep some elements, round at random to a few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lamina.layout import Params

if TYPE_CHECKING:
    from lamina.job import Turn

_BLOCK = 1024
_RANGE = ":range"


@dataclass(frozen=True)
class Coding:
    """How the change of a tensor is sent: y = Q(S(R x)), each step optional, with E[R^-1 S^-1 Q(S(R x))] = x.

    R is H D / sqrt(b) on blocks of b elements: random signs D and a Hadamard matrix H, which spread out what is large
    in few places. S keeps a fixed number of elements at random; S^-1 scales those up, and the others are zero. Q rounds
    to one of 2^bits levels, evenly spaced from the least to the largest element, up or down at random in proportion.
    Both ends draw D and S from the turn.

    **Source:** Caldas et al. 2018, section 3.1; Konecny et al. 2016, section 3.
    **Departs:** blocks of at most 1024 elements, so that little is padded to a power of two; Kashin's representation is
    left out, and so is the coding of what the server sends.

    Attributes:
        rotate: Whether to.
        share: Of the elements that are sent.
        bits: 1, 2, 4 or 8 for each; 0 sends fp32.
    """

    rotate: bool = False
    share: float = 1.0
    bits: int = 0

    def lengths(self, numel: int) -> tuple[int, int]:
        """Elements of a tensor after padding, and how many of them are sent."""
        block = self.block(numel)
        padded = -(-numel // block) * block
        return padded, max(1, math.ceil(round(self.share * padded, 9)))

    def block(self, numel: int) -> int:
        """Elements that are rotated together."""
        return min(_BLOCK, 1 << (numel - 1).bit_length()) if self.rotate else 1

    def sends(self, name: str, numel: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what is sent of a tensor."""
        _, sent = self.lengths(numel)
        if not self.bits:
            return {name: ((sent,), torch.float32)}
        return {name: ((-(-sent * self.bits // 8),), torch.uint8), name + _RANGE: ((2,), torch.float32)}

    def encode(self, name: str, new: Tensor, old: Tensor, turn: Turn) -> Params:
        """What is sent of `new` to where `old` is known."""
        padded, sent = self.lengths(new.numel())
        x = torch.zeros(padded)
        torch.sub(new, old, out=x[: new.numel()].view(new.shape))
        if self.rotate:
            blocks = x.view(-1, self.block(new.numel()))
            _hadamard(blocks.mul_(self._signs(name, new.numel(), turn)))
        if sent < padded:
            places = self._places(name, new.numel(), turn)
            x = x[places]
            del places
        if not self.bits:
            return {name: x}
        low, high = x.aminmax()
        step = (high - low) / (2**self.bits - 1)
        x.sub_(low).div_(step.clamp(min=torch.finfo(torch.float32).tiny))
        x = torch.from_numpy(turn.rng(f"rounding/{name}").random(sent, dtype=np.float32)).add_(x)
        return {name: _pack(x.clamp_(max=2**self.bits - 1), self.bits), name + _RANGE: torch.stack([low, step])}

    def decode(self, name: str, arrays: Mapping[str, Tensor], old: Tensor, turn: Turn) -> Tensor:
        """What is known of `new` where `arrays` arrived."""
        padded, sent = self.lengths(old.numel())
        x = arrays[name]
        if self.bits:
            low, step = arrays[name + _RANGE]
            x = _unpack(x, self.bits)[:sent] * step + low
        if sent < padded:
            x = torch.zeros(padded).index_copy(0, self._places(name, old.numel(), turn), x * (padded / sent))
        if self.rotate:
            x = _hadamard(x.reshape(-1, self.block(old.numel())).clone()) * self._signs(name, old.numel(), turn)
        return old + x.flatten()[: old.numel()].view(old.shape)

    def _signs(self, name: str, numel: int, turn: Turn) -> Tensor:
        drawn = turn.rng(f"signs/{name}").integers(2, size=self.block(numel)).astype(np.float32)
        return torch.from_numpy(drawn).mul_(2).sub_(1)

    def _places(self, name: str, numel: int, turn: Turn) -> Tensor:
        padded, sent = self.lengths(numel)
        return torch.from_numpy(turn.rng(f"places/{name}").permutation(padded))[:sent]


def _hadamard(x: Tensor) -> Tensor:
    """Rows times H / sqrt(size), in place; twice is the identity."""
    size = x.shape[1]
    for power in range(size.bit_length() - 1):
        pairs = x.view(-1, 2, 1 << power)
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0].add_(pairs[:, 1])
        pairs[:, 1] = difference
        del difference
    return x.mul_(1 / math.sqrt(size))


def _pack(levels: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, rounded down, several to a byte."""
    each = 8 // bits
    codes = torch.zeros(-(-len(levels) // each), each, dtype=torch.uint8)
    codes.view(-1)[: len(levels)] = levels
    packed = codes[:, 0].clone()
    for place in range(1, each):
        packed |= codes[:, place] << (place * bits)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """What `_pack` was given, and what fills the last byte, in fp32."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return torch.bitwise_and(packed[:, None] >> shifts, 2**bits - 1).flatten().float()
