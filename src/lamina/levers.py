"""Levers: ways to train the same plan in less memory. They are not methods: any plan can have any of them.

The exact ones leave the mathematics as it is; what a device computes differs by rounding alone. The planner uses only
those without which a plan does not fit (see `lamina.planner`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lamina.errors import nearest

Allowed = str | tuple[str, ...]
"""What a config's `levers` says: "none", "exact", "all", or names of `LADDER`."""


@dataclass(frozen=True, slots=True)
class Levers:
    """How a device saves memory while it trains a plan.

    Attributes:
        chunked_loss: Logits and their gradient for a few tokens at a time; no [tokens, vocabulary] matrix.
        fused_update: Each block is updated as soon as its gradient is complete, which is then dropped; with clipping by
            global norm, a first backward pass finds the norm.
        prefix_cache: The frozen part below the trained blocks runs once per round, block by block with one block of
            weights in memory, and its outputs are kept in "ram" or on "disk"; "" runs it in every step.
        cache_bits: Of those outputs; 16 is not exact.
        micro_batch: Sequences per forward and backward pass, gradients accumulate; 0 takes the batch at once.
        recompute: Of a trained block only its input is kept; backward runs it again, a few sequences at a time.
        frozen_bits: Of frozen matrices: 32, or 16 (half precision) or 8 (integers, a scale per row); not exact.
        optimizer: "" as the `[local]` table says; "adamw8" (states in 8 bits) or "adafactor" in the place of "adamw";
            not exact.
    """

    chunked_loss: bool = False
    fused_update: bool = False
    prefix_cache: Literal["", "ram", "disk"] = ""
    cache_bits: Literal[16, 32] = 32
    micro_batch: int = 0
    recompute: bool = False
    frozen_bits: Literal[8, 16, 32] = 32
    optimizer: Literal["", "adamw8", "adafactor"] = ""

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """The levers that are on, in the order of `LADDER`: name, with a number where one matters, and fields."""
        found = []
        for rung in LADDER:
            values = {key: getattr(self, key) for key in rung.sets}
            if rung.name == "micro_batch" and self.micro_batch:
                found.append((f"micro_batch {self.micro_batch}", values))
            elif values == rung.sets:
                found.append((rung.name, values))
        return found

    def names(self) -> list[str]:
        """Of the levers that are on."""
        return [name for name, _ in self.parts()]


@dataclass(frozen=True, slots=True)
class Rung:
    """One lever of the ladder.

    Attributes:
        name: In configs and tables.
        exact: Whether it leaves the mathematics as it is.
        sets: The fields of `Levers` it sets.
    """

    name: str
    exact: bool
    sets: dict[str, Any]


LADDER = (
    Rung("chunked_loss", True, {"chunked_loss": True}),
    Rung("fused_update", True, {"fused_update": True}),
    Rung("cache_ram", True, {"prefix_cache": "ram"}),
    Rung("cache_disk", True, {"prefix_cache": "disk"}),
    Rung("micro_batch", True, {"micro_batch": 1}),
    Rung("recompute", True, {"recompute": True}),
    Rung("frozen16", False, {"frozen_bits": 16}),
    Rung("cache16", False, {"cache_bits": 16}),
    Rung("frozen8", False, {"frozen_bits": 8}),
    Rung("adamw8", False, {"optimizer": "adamw8"}),
    Rung("adafactor", False, {"optimizer": "adafactor"}),
)
"""All levers, cheap to dear: exact before inexact, then by operations and time."""

NAMES = tuple(rung.name for rung in LADDER)
EXACT = tuple(rung.name for rung in LADDER if rung.exact)


def rungs(allowed: Allowed) -> Iterator[Rung]:
    """The levers that a config's `levers` allows, in order.

    Raises:
        ValueError: A name that is no lever.
    """
    named: dict[str, Sequence[str]] = {"none": (), "exact": EXACT, "all": NAMES}
    chosen = named.get(allowed, (allowed,)) if isinstance(allowed, str) else allowed
    accepted = (*named, *NAMES) if isinstance(allowed, str) else NAMES
    for name in chosen:
        if name in named:
            raise ValueError(f'levers: "{name}" stands alone, as levers = "{name}"; a list takes {", ".join(NAMES)}')
        if name not in NAMES:
            raise ValueError(f"levers: unknown {name!r}; {nearest(name, accepted)}")
    return (rung for rung in LADDER if rung.name in chosen)
