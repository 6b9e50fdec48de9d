"""Handwritten digits, the task of images that comes with lamina."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from importlib import resources
from typing import ClassVar

import numpy as np

from lamina.data.dealing import demand
from lamina.data.decoding import stack
from lamina.data.pictures import Album, Pictures, hold_out

ASSET = "digits.xz"
SIDE, LEVELS = 8, 16  # pixels, and the largest value of one
TEST_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class Digits(Album):
    """1,797 grey images of 8 x 8 pixels in ten classes, a fifth of each held out for testing, the same for every seed.

    Source: the test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI Machine Learning
    Repository, CC BY 4.0), as scikit-learn has it. Digits are moved, never mirrored.

    Attributes:
        size: Side that the images are resized to, in pixels.

    Raises:
        UserError: A field is out of range.
    """

    path: ClassVar[None] = None  # they come with lamina
    flips: ClassVar[bool] = False

    size: int = SIDE

    def __post_init__(self) -> None:
        """Refuse fields that are out of range."""
        super().__post_init__()
        demand("size", self.size, self.size >= 1, "at least 1")

    def classes(self) -> tuple[str, ...]:
        """The digits."""
        return tuple("0123456789")

    def side(self) -> int:
        """Side of the images in pixels."""
        return self.size

    def read(self) -> tuple[Pictures, Pictures]:
        """Training and test set."""
        with resources.as_file(resources.files("lamina") / "assets" / ASSET) as path:
            table = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8).reshape(-1, SIDE * SIDE + 1)
        values = table[:, :-1].reshape(-1, SIDE, SIDE, 1).astype(np.uint16)
        images = ((255 * values + LEVELS // 2) // LEVELS).astype(np.uint8)
        return hold_out(
            Pictures(stack([images], len(images), self.size, 1), table[:, -1].astype(np.int64)), TEST_FRACTION
        )
