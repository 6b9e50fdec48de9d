"""Device classes, their budgets, and which device is of which class."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lamina.cost import Cost
from lamina.turn import generator

RESOURCES = {"memory_bytes": "memory", "up_bytes": "uplink", "down_bytes": "downlink", "flops": "flops"}
"""Resource, as in `Cost` and `Budget` -> its key in a `[[fleet]]` table."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{letter}i": 1024**power for power, letter in enumerate("KMGT", 1)
}
_QUANTITY = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kKMGT]i?)?(B|FLOPs?)?\s*")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a device can spend in a round; None where nothing limits it.

    Attributes:
        memory_bytes: Of training, over all categories.
        up_bytes: Sent to the server.
        down_bytes: Received from it.
        flops: Operations of all local steps.
    """

    memory_bytes: int | None = None
    up_bytes: int | None = None
    down_bytes: int | None = None
    flops: int | None = None

    def exceeded(self, cost: Cost) -> list[str]:
        """The resources of which `cost` needs more than there is."""
        limits = ((name, getattr(self, name)) for name in RESOURCES)
        return [name for name, limit in limits if limit is not None and getattr(cost, name) > limit]


@dataclass(frozen=True)
class DeviceClass:
    """Devices with one budget: a `[[fleet]]` table.

    Quantities are integers or text with a unit: 64000000, "64 MB", "61 MiB", "20 GFLOP". Not given means unlimited.

    Attributes:
        name: Of the class.
        share: Relative number of its devices.
        memory: Bytes of training memory.
        uplink: Bytes per round to the server.
        downlink: Bytes per round from the server.
        flops: Operations per round.
    """

    name: str
    share: float = 1.0
    memory: str | int | None = None
    uplink: str | int | None = None
    downlink: str | int | None = None
    flops: str | int | None = None

    def __post_init__(self) -> None:
        """Refuse shares and quantities that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if not 0 < self.share < math.inf:
            raise ValueError(f"share must be above 0 and finite, got {self.share}")
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """The quantities as numbers."""
        given = {name: (key, getattr(self, key)) for name, key in RESOURCES.items()}
        return Budget(**{name: quantity(*each) for name, each in given.items() if each[1] is not None})


def quantity(key: str, value: str | int) -> int:
    """A number of bytes or operations, from an integer or text such as "61 MiB".

    Raises:
        ValueError: It is not a quantity above zero.
    """
    match = _QUANTITY.fullmatch(str(value))
    try:
        fits = match and (match[3] is None or (match[3] == "B") != (key == "flops"))
        number = Fraction(match[1]) * _UNITS[_unit(match[2])] if match and fits else Fraction(0)
    except ValueError:
        number = Fraction(0)
    if not 1 <= number < 10**30:
        example = "20 GFLOP" if key == "flops" else "61 MiB"
        raise ValueError(f'{key} must be a quantity above 0, such as 64000000 or "{example}"; got {value!r}')
    return int(number)


def _unit(text: str | None) -> str:
    return text[0].upper() + text[1:].lower() if text else ""


def assign(classes: Sequence[DeviceClass], devices: int, seed: int) -> list[int]:
    """The class of every device, [devices]: counts by largest remainder of the shares, order by seed."""
    shares = np.array([each.share for each in classes], dtype=float)
    exact = devices * shares / shares.sum()
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: devices - counts.sum()]:
        counts[index] += 1
    members = np.repeat(np.arange(len(classes)), counts)
    return [int(index) for index in generator(seed, "fleet").permutation(members)]
