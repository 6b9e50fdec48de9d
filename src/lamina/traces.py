"""Real phones and links as a fleet: `fleet = "traces"`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from lamina.fleet import Budget, Rates, Roster, rate
from lamina.turn import generator

ASSET = "phones.json"
GIB, KIB = 2**30, 2**10


@dataclass(frozen=True)
class Traces:
    """Phones of the AI-Benchmark list on links that users measured: the `[fleet]` table with `name = "traces"`.

    Every device is one of 333 phones on one of 19 links, drawn by the seed. The lists are those of FLASH (Yang et al.,
    2021); docs/clock.md says what of this is data and what is a model.

    Attributes:
        memory_share: Memory for training: this share of the RAM of the phone with the least RAM in the class.
        classes: Classes of memory, at most; phones with the same RAM are in one.
        speed: Operations per second of a phone with the median score. The others: in proportion to their scores of
            floating-point networks on the CPU.
        since: Only phones of this year and later; the list begins with 2009.
        drift: Part of the memory that a device may lack in a round: how much, is drawn evenly. The network, and what is
            settled beforehand, go by what is always there; plans by what is there in the round.
    """

    memory_share: float = 0.05
    classes: int = 6
    speed: str = "2 GFLOP/s"
    since: int = 0
    drift: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share must be above 0 and at most 1, got {self.memory_share}")
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1, got {self.classes}")
        if not 0 <= self.drift < 1:
            raise ValueError(f"drift must be from 0 to below 1, got {self.drift}")
        rate("speed", self.speed)
        latest = max(year for _, year, _, _ in _asset()["phones"])
        if self.since > latest:
            raise ValueError(f"since must be at most {latest}, the year of the latest phones; got {self.since}")

    def roster(self, devices: int, seed: int) -> Roster:
        """The phones in classes of memory, strongest first; speed and links are each device's own."""
        asset = _asset()
        median = np.median([score for *_, score in asset["phones"]])
        ram, score = np.array([(ram, score) for _, year, ram, score in asset["phones"] if year >= self.since]).T
        phone = generator(seed, "phones").integers(len(ram), size=devices)
        link = generator(seed, "links").integers(len(asset["links"]), size=devices)
        down, down_std, up, up_std = np.array(asset["links"])[link].T
        speed = rate("speed", self.speed) * score[phone] / median
        class_of = self._classes(ram)
        sizes = [ram[class_of == index] for index in range(class_of.max() + 1)]
        budgets = [Budget(memory_bytes=int(self.memory_share * each.min() * GIB)) for each in sizes]
        return Roster(
            tuple(_name(each.min(), each.max()) for each in sizes),
            tuple(each.lacking(self.drift) for each in budgets),
            class_of[phone].tolist(),
            Rates(KIB * down, speed, KIB * up, down_std / down, up_std / up),
            tuple(each.memory_bytes if self.drift else None for each in budgets),
        )

    def _classes(self, ram: np.ndarray) -> np.ndarray:
        """Class of each phone, int64 [phones], 0 for most RAM: quantiles of RAM, with equal RAM never split."""
        _, size, counts = np.unique(-ram, return_inverse=True, return_counts=True)
        middle = np.cumsum(counts) - counts / 2
        _, class_of = np.unique(np.floor(self.classes * middle / len(ram)), return_inverse=True)
        return class_of[size].astype(np.int64)


def _name(least: float, most: float) -> str:
    return f"{least:g} GB" if least == most else f"{least:g}-{most:g} GB"


def _asset() -> dict[str, list[list[Any]]]:
    """Phones (name, year, RAM in GB, score) and links (means and standard deviations down and up in KiB/s)."""
    found: dict[str, list[list[Any]]] = json.loads((resources.files("lamina") / "assets" / ASSET).read_text("utf-8"))
    return found
