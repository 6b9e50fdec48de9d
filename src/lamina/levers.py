"""Levers: ways to train the same plan in less memory. They are not methods: any plan can have any of them.

The exact ones leave the mathematics as it is; what a device computes differs by rounding alone. The planner turns
levers on in the order of `LADDER`, and only those without which a plan does not fit (see `lamina.planner`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Allowed = Literal["none", "exact", "all"] | tuple[str, ...]


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

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rung:
    """One lever of the ladder.

    Attributes:
        name: In configs and tables.
        exact: Whether it leaves the mathematics as it is.
        sets: The fields of `Levers` it sets.
        text: What it does, for people.
    """

    name: str
    exact: bool
    sets: dict[str, Any]
    text: str


LADDER = (
    Rung("chunked_loss", True, {"chunked_loss": True}, "logits a few tokens at a time"),
    Rung("fused_update", True, {"fused_update": True}, "each block updated as soon as its gradient is there"),
    Rung("cache_ram", True, {"prefix_cache": "ram"}, "frozen prefix run once, outputs kept in memory"),
    Rung("cache_disk", True, {"prefix_cache": "disk"}, "frozen prefix run once, outputs kept on disk"),
    Rung("micro_batch", True, {"micro_batch": 1}, "a batch in several passes"),
    Rung("recompute", True, {"recompute": True}, "blocks run again in backward"),
    Rung("frozen16", False, {"frozen_bits": 16}, "frozen matrices in 16 bits"),
    Rung("cache16", False, {"cache_bits": 16}, "outputs of the prefix in 16 bits"),
    Rung("frozen8", False, {"frozen_bits": 8}, "frozen matrices in 8 bits"),
    Rung("adamw8", False, {"optimizer": "adamw8"}, "AdamW with states in 8 bits"),
    Rung("adafactor", False, {"optimizer": "adafactor"}, "Adafactor in the place of AdamW"),
)
"""All levers in the order in which the planner turns them on: exact before inexact, then by operations and time."""

FREE = ("chunked_loss", "fused_update", "cache_ram", "cache_disk")
"""Levers that cost no operations and hardly any time."""
SLOW = ("micro_batch", "recompute")
"""Exact levers that cost time: smaller passes; the forward of the trained blocks once more."""
NAMES = tuple(rung.name for rung in LADDER)
EXACT = tuple(rung.name for rung in LADDER if rung.exact)


def rungs(allowed: Allowed) -> Iterator[Rung]:
    """The levers that a config's `levers` allows, in order.

    Raises:
        ValueError: A name that is no lever.
    """
    named = {"none": (), "exact": EXACT, "all": NAMES}
    chosen: Sequence[str] = named[allowed] if isinstance(allowed, str) else allowed
    if unknown := [name for name in chosen if name not in NAMES]:
        raise ValueError(f'levers must be "none", "exact", "all" or a list of {", ".join(NAMES)}; got {unknown[0]!r}')
    return (rung for rung in LADDER if rung.name in chosen)


def from_json(data: dict[str, Any]) -> Levers:
    """The levers written by `to_json`."""
    return Levers(**{each.name: data[each.name] for each in fields(Levers)})
