"""Device classes, their budgets and rates, and which device is of which class."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from lamina.cost import Cost
from lamina.errors import UserError
from lamina.job import Turn
from lamina.turn import generator

RESOURCES = {"memory_bytes": "memory", "up_bytes": "uplink", "down_bytes": "downlink", "flops": "flops"}
"""Resource, as in `Cost` and `Budget` -> its key in a `[[fleet]]` table."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{letter}i": 1024**power for power, letter in enumerate("KMGT", 1)
}
_NUMBER = r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kKMGT]i?)?"
_QUANTITY = re.compile(_NUMBER + r"(B|FLOPs?)?\s*")
_MOST_SHARE = 1e30  # so that no sum overflows
_RATE = re.compile(_NUMBER + r"(B|bit|FLOP)/s\s*")


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

    def lacking(self, part: float) -> Budget:
        """The same with so much less memory, as a part of it."""
        return self if self.memory_bytes is None else replace(self, memory_bytes=int(self.memory_bytes * (1 - part)))

    def exceeded(self, cost: Cost) -> list[str]:
        """The resources of which `cost` needs more than there is."""
        limits = ((name, getattr(self, name)) for name in RESOURCES)
        return [name for name, limit in limits if limit is not None and getattr(cost, name) > limit]


@dataclass(frozen=True)
class Rates:
    """How fast devices are. Each attribute is float64 [devices]; a rate is infinite where work takes no time.

    Links vary from round to round: their rates are log-normal with the given means and spreads.

    Attributes:
        down: Bytes per second from the server, in the mean.
        speed: FLOP per second.
        up: Bytes per second to the server, in the mean.
        down_spread: Standard deviation of `down` over its mean.
        up_spread: The same of `up`.
    """

    down: np.ndarray
    speed: np.ndarray
    up: np.ndarray
    down_spread: np.ndarray
    up_spread: np.ndarray

    def phases(self, devices: np.ndarray, work: np.ndarray, turn: Turn | None = None) -> np.ndarray:
        """How long devices receive, compute and send.

        Args:
            devices: Which, int64 [n].
            work: Bytes that each receives, operations, and bytes that it sends, [n, 3].
            turn: The round whose links count; None: the mean rates.

        Returns:
            Seconds, float64 [n, 3].
        """
        rates = np.stack([self.down[devices], self.speed[devices], self.up[devices]], axis=1)
        if turn is not None:
            sigma = np.sqrt(np.log1p(np.stack([self.down_spread[devices], self.up_spread[devices]], axis=1) ** 2))
            draws = np.zeros_like(sigma)
            for row in np.flatnonzero(sigma.any(axis=1)):
                draws[row] = replace(turn, device=int(devices[row])).rng("link").standard_normal(2)
            rates[:, [0, 2]] *= np.exp(sigma * draws - sigma**2 / 2)
        seconds: np.ndarray = work / rates
        return seconds


@dataclass(frozen=True)
class Roster:
    """The devices of a run.

    Attributes:
        names: Of the classes.
        budgets: Of the classes, with the memory that is always there.
        class_of: Class index of every device.
        rates: Of every device.
        best_memory_bytes: Of the classes, the memory in the best of rounds; None where it is always the same.
    """

    names: tuple[str, ...]
    budgets: tuple[Budget, ...]
    class_of: list[int]
    rates: Rates
    best_memory_bytes: tuple[int | None, ...]


@dataclass(frozen=True)
class DeviceClass:
    """Devices with one budget: a `[[fleet]]` table.

    Quantities are integers or text with a unit: 64000000, "64 MB", "61 MiB", "20 GFLOP". Not given means unlimited.
    Rates are text: "4 Mbit/s", "1 MB/s", "20 GFLOP/s". Not given means that it takes no time.

    Attributes:
        name: Of the class.
        share: Relative number of its devices, at most 1e30.
        memory: Bytes of training memory.
        uplink: Bytes per round to the server.
        downlink: Bytes per round from the server.
        flops: Operations per round.
        speed: Operations per second.
        up_rate: Bits or bytes per second to the server.
        down_rate: Bits or bytes per second from the server.
        devices: Indices of its devices, from 0. Not given: its share, drawn, of those that no class names.
        drift: Part of the memory that a device may lack in a round: how much, is drawn evenly. The network, and what is
            settled beforehand, go by what is always there; plans by what is there in the round.
    """

    name: str
    share: float = 1.0
    memory: str | int | None = None
    uplink: str | int | None = None
    downlink: str | int | None = None
    flops: str | int | None = None
    speed: str | None = None
    up_rate: str | None = None
    down_rate: str | None = None
    devices: tuple[int, ...] | None = None
    drift: float = 0.0

    def __post_init__(self) -> None:
        """Refuse shares and quantities that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if not 0 < self.share <= _MOST_SHARE:
            raise ValueError(f"share must be above 0 and at most {_MOST_SHARE:g}, got {self.share}")
        if not 0 <= self.drift < 1:
            raise ValueError(f"drift must be from 0 to below 1, got {self.drift}")
        if self.drift and self.memory is None:
            raise ValueError(f"drift is of the memory, and none is given; got {self.drift}")
        _ = self.budget, self.rates

    @property
    def budget(self) -> Budget:
        """The quantities as numbers."""
        given = {name: (key, getattr(self, key)) for name, key in RESOURCES.items()}
        return Budget(**{name: quantity(*each) for name, each in given.items() if each[1] is not None})

    @property
    def rates(self) -> tuple[float, float, float]:
        """Bytes per second from the server, operations per second, bytes per second to the server."""
        given = ((key, getattr(self, key)) for key in ("down_rate", "speed", "up_rate"))
        down, speed, up = (math.inf if text is None else rate(key, text) for key, text in given)
        return down, speed, up


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


def rate(key: str, value: str) -> float:
    """Bytes or operations per second, from text such as "4 Mbit/s", "1 MB/s" or, of `speed`, "20 GFLOP/s".

    Raises:
        ValueError: It is not a rate above zero.
    """
    match = _RATE.fullmatch(value)
    try:
        fits = match and (match[3] == "FLOP") == (key == "speed")
        number = Fraction(match[1]) * _UNITS[_unit(match[2])] if match and fits else Fraction(0)
    except ValueError:
        number = Fraction(0)
    if not 0 < number < 10**30:
        example = '"20 GFLOP/s"' if key == "speed" else '"4 Mbit/s" or "1 MB/s"'
        raise ValueError(f"{key} must be a rate above 0, such as {example}; got {value!r}")
    return float(number / 8 if match and match[3] == "bit" else number)


def _unit(text: str | None) -> str:
    return text[0].upper() + text[1:].lower() if text else ""


def assign(classes: Sequence[DeviceClass], devices: int, seed: int) -> list[int]:
    """The class of every device, [devices]: where none names it, counts by largest remainder of the shares, by seed.

    Raises:
        UserError: A device that classes name is not there, or is named twice; or one is left over for no class.
    """
    named = [(device, index) for index, each in enumerate(classes) for device in each.devices or ()]
    class_of = dict(named)
    if len(class_of) < len(named) or not class_of.keys() <= set(range(devices)):
        raise UserError(
            f"devices of [[fleet]] must be different ones from 0 to {devices - 1}, "
            f"got {', '.join(str(device) for device, _ in named)}"
        )
    rest = [device for device in range(devices) if device not in class_of]
    drawn = [index for index, each in enumerate(classes) if each.devices is None]
    if rest and not drawn:
        raise UserError(f"device {rest[0]} is of no class: name it in devices of one, or give one class none")
    if rest:
        shares = np.array([classes[index].share for index in drawn], dtype=float)
        exact = len(rest) * shares / shares.sum()
        counts = np.floor(exact).astype(int)
        for index in np.argsort(counts - exact, kind="stable")[: len(rest) - counts.sum()]:
            counts[index] += 1
        members = np.repeat(np.array(drawn), counts)
        class_of |= zip(rest, generator(seed, "fleet").permutation(members).tolist(), strict=True)
    return [class_of[device] for device in range(devices)]


def roster(classes: Sequence[DeviceClass], devices: int, seed: int) -> Roster:
    """The devices of some classes; those of a class are alike."""
    class_of = assign(classes, devices, seed)
    down, speed, up = np.array([each.rates for each in classes])[class_of].T
    steady = np.zeros(devices)
    rates = Rates(down, speed, up, steady, steady)
    budgets = tuple(each.budget.lacking(each.drift) for each in classes)
    best = tuple(each.budget.memory_bytes if each.drift else None for each in classes)
    return Roster(tuple(each.name for each in classes), budgets, class_of, rates, best)
