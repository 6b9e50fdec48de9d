"""Windows into a stream of tokens, and where they start.

A text of L tokens has n = L - window windows, one per token that has a whole window before it: those of LEAF (Caldas et
al., 2018). The first floor(train_fraction n) are for training, the next window - 1 overlap them and are skipped, the
rest are for testing: no target of a test window is a target of a training window.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lamina.job import Turn


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of one device, a view into a stream of tokens.

    Attributes:
        ids: The stream, unsigned or signed integers [tokens]; the same array for every device of a task.
        starts: First token of each window, int64 [windows].
        window: Tokens of a window; the target of the last one is the token after the window.
    """

    ids: np.ndarray
    starts: np.ndarray
    window: int

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.starts)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, the same one token on, of the windows `rows`.

        Args:
            rows: Indices of windows, integers [rows].

        Returns:
            Token ids, int64 [rows, window] each.

        Raises:
            IndexError: There is no such window.
        """
        places = self.starts[rows][:, None] + np.arange(self.window + 1)
        inputs, targets = self.ids[places[:, :-1]], self.ids[places[:, 1:]]
        return inputs.astype(np.int64), targets.astype(np.int64)

    def at(self, turn: Turn) -> Windows:
        """The same in every turn."""
        return self


def ends(length: int, window: int, train_fraction: float) -> tuple[int, int]:
    """Number of windows for training, at least 1, and of all windows, of a text of `length` tokens."""
    count = length - window
    return max(1, int(train_fraction * count)), count


def least(window: int, train_fraction: float) -> int:
    """Tokens of the shortest text with a window for training and one for testing."""

    def enough(length: int) -> bool:
        train, count = ends(length, window, train_fraction)
        return count > train + window - 1

    return bisect.bisect_left(range(2**62), True, key=enough)


def training(length: int, window: int, stride: int, train_fraction: float) -> np.ndarray:
    """First tokens of the training windows of a text, int64 [windows]; of all of it with train_fraction = 1.

    Args:
        length: Of the text, in tokens; more than `window`.
        window: Tokens of a window.
        stride: Tokens between windows.
        train_fraction: Part of all windows that is for training.
    """
    return np.arange(0, ends(length, window, train_fraction)[0], stride)


def testing(length: int, window: int, scored: int, train_fraction: float, most: int | None) -> np.ndarray:
    """First tokens of the test windows of a text, int64 [windows]; of all of it with train_fraction = 0.

    Args:
        length: Of the text, in tokens; more than `window`.
        window: Tokens of a window.
        scored: Tokens between windows.
        train_fraction: Part of all windows that is for training.
        most: At most this many are kept, evenly spaced; None: all.
    """
    train, count = ends(length, window, train_fraction)
    found = np.arange(train + window - 1 if train_fraction else 0, count, scored)
    kept = len(found) if most is None else min(most, len(found))
    return found[np.arange(kept) * len(found) // max(kept, 1)]
