"""The virtual clock: how long a round takes on the devices, who answers in time, and what the others have spent.

A device receives, computes and sends, one after the other; each takes its amount over its rate. Amounts are those that
the plan predicts, so all is known before anything is trained, and who does not answer need not be simulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lamina.availability import MODELS
from lamina.fleet import Rates
from lamina.job import Turn

LATE, AWAY, FAILED, ABANDONED = "late", "unavailable", "failed", "the round was abandoned"


@dataclass(frozen=True)
class Clock:
    """How a round ends, and when devices can take part: the `[clock]` table.

    Sources: Bonawitz et al. (2019), "Towards Federated Learning at Scale", sections 2 and 9; Yang et al. (2021), FLASH;
    Lai et al. (2022), FedScale.

    Attributes:
        deadline: Seconds after which a round ends; who has not answered is late. 0: none.
        over_selection: So many times the cohort are asked. The round ends when as many as the cohort have answered.
        min_updates: With fewer usable updates a round is abandoned, and the network stays as it is.
        availability: "always", "diurnal" (a window a day, a model), or a JSON file of traces; see docs/clock.md.
            Devices are asked that are available; who goes before it has answered is lost for the round.
        available_hours: Mean length of the window of "diurnal".
        failures: Chance that a device that is asked breaks down on the way, at a moment drawn evenly from its work.
    """

    deadline: float = 0.0
    over_selection: float = 1.0
    min_updates: int = 1
    availability: str = MODELS[0]
    available_hours: float = 8.0
    failures: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if not 0 <= self.deadline < math.inf:
            raise ValueError(f"deadline must be finite and not negative, got {self.deadline}")
        if not 1 <= self.over_selection <= 100:
            raise ValueError(f"over_selection must be from 1 to 100, got {self.over_selection}")
        if self.min_updates < 1:
            raise ValueError(f"min_updates must be at least 1, got {self.min_updates}")
        if not 0 < self.available_hours <= 24:
            raise ValueError(f"available_hours must be above 0 and at most 24, got {self.available_hours}")
        if not 0 <= self.failures < 1:
            raise ValueError(f"failures must be from 0 to below 1, got {self.failures}")

    @property
    def needs_rates(self) -> bool:
        """Whether something is asked for that means nothing where devices take no time."""
        return self.deadline > 0 or self.over_selection > 1 or self.availability != MODELS[0]

    def asked(self, cohort: int) -> int:
        """Devices that are asked, for so many answers."""
        return math.ceil(cohort * self.over_selection - 1e-9)  # 1.1 * 10 is a little more than 11


@dataclass(frozen=True, slots=True)
class Stint:
    """What becomes of a device in a round.

    Attributes:
        seconds: From the beginning of the round until it had answered, went away, or the round ended.
        down_bytes: It had received by then.
        flops: It had computed.
        up_bytes: It had sent.
        received: Whether it had received all.
        reason: Why its answer does not count; None if it does.
    """

    seconds: float
    down_bytes: int
    flops: int
    up_bytes: int
    received: bool
    reason: str | None


def settle(
    clock: Clock,
    cohort: int,
    devices: np.ndarray,
    work: np.ndarray,
    rates: Rates,
    left: np.ndarray,
    turn: Turn,
) -> tuple[list[Stint], float]:
    """What becomes of each device of a round, and how long the round takes.

    A round ends at its deadline, or earlier: when as many devices as the cohort have answered, or nobody is left who
    could. Of devices that answer at the same time, a draw says which is first.

    Args:
        clock: The settings.
        cohort: Answers that are wanted.
        devices: That are asked, int64 [n].
        work: Bytes that each receives, operations, and bytes that it sends, int64 [n, 3].
        rates: Of all devices.
        left: Seconds that each of the asked stays available, float64 [n].
        turn: The round.
    """
    ends = np.cumsum(rates.phases(devices, work, turn), axis=1)
    done = ends[:, -1]
    fails, parts = _failures(clock, devices, turn)
    broken = np.where(fails, parts * done, math.inf)
    order = np.lexsort((turn.rng("ties").random(len(done)), done))
    first = order[((done <= left) & ~fails)[order]][:cohort]
    stops = np.minimum(np.minimum(done, left), broken)
    over = stops.max(initial=0.0) if len(first) < cohort else done[first[-1]]
    over = float(min(over, clock.deadline or math.inf))
    stops = np.minimum(stops, over)
    answered = np.zeros(len(done), dtype=bool)
    answered[first] = done[first] <= over
    begun = np.concatenate([np.zeros((len(done), 1)), ends[:, :-1]], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.clip((stops[:, None] - begun) / (ends - begun), 0.0, 1.0)
    shares = np.where(stops[:, None] >= ends, 1.0, shares)
    spent = np.where(shares == 1, work, np.floor(shares * work)).astype(np.int64)
    away = ~answered & (left <= over) & (left < np.minimum(done, broken))
    failed = ~answered & (broken <= np.minimum(over, left))
    reasons = [
        None if a else AWAY if b else FAILED if c else LATE for a, b, c in zip(answered, away, failed, strict=True)
    ]
    stints = [
        Stint(float(stop), int(down), int(flops), int(up), bool(share[0] == 1), reason)
        for stop, (down, flops, up), share, reason in zip(stops, spent, shares, reasons, strict=True)
    ]
    return stints, over


def _failures(clock: Clock, devices: np.ndarray, turn: Turn) -> tuple[np.ndarray, np.ndarray]:
    """Which devices break down, bool [n], and which part of their work is done by then, float64 [n]."""
    draws = np.ones((len(devices), 2))
    if clock.failures:
        for row, device in enumerate(devices.tolist()):
            draws[row] = replace(turn, device=device).rng("failure").random(2)
    return draws[:, 0] < clock.failures, draws[:, 1]
