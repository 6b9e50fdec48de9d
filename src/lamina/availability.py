"""When devices can take part: spans of time that come again, from a model or from a file of traces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lamina import files
from lamina.errors import UserError
from lamina.turn import generator

MODELS = ("always", "diurnal")
DAY_SECONDS, HOUR_SECONDS = 86_400, 3_600
_MIDDLE_HOURS, _SPREAD_HOURS = 3.0, 5.2


@dataclass(frozen=True)
class Availability:
    """Spans of time in which devices can take part. Those of a device do not touch, the last and the first neither.

    Attributes:
        period_seconds: After which all spans come again.
        device: Whose each span is, ascending, int64 [spans].
        start_seconds: When it begins, in [0, period), int64 [spans].
        length_seconds: In [1, period], int64 [spans]; it may reach into the next period.
        devices: How many there are.
    """

    period_seconds: int
    device: np.ndarray
    start_seconds: np.ndarray
    length_seconds: np.ndarray
    devices: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that it says."""
        arrays = (self.device, self.start_seconds, self.length_seconds)
        return files.digest(b"".join([str(self.period_seconds).encode(), *(each.tobytes() for each in arrays)]))

    def left(self, now: float) -> np.ndarray:
        """Seconds that each device stays, float64 [devices]; 0 where it is not there, infinite where it never goes."""
        since = (now - self.start_seconds) % self.period_seconds
        there = since < self.length_seconds
        left = np.where(self.length_seconds == self.period_seconds, np.inf, self.length_seconds - since)
        found = np.zeros(self.devices)
        found[self.device[there]] = left[there]
        return found

    def begin(self, now: float, able: np.ndarray, count: int) -> float:
        """The first moment from `now` on at which so many of the able devices, bool [devices], are there.

        Raises:
            UserError: There are never so many.
        """
        here = int(((self.left(now) > 0) & able).sum())
        if here >= count:
            return now
        ours = able[self.device]
        start, length = self.start_seconds[ours], self.length_seconds[ours]
        period = self.period_seconds  # whole seconds, so that a span begins exactly when `left` says so
        begun = start + np.floor_divide(now - start, period).astype(np.int64) * period
        starts = begun + period
        ends = np.where(now - begun < length, begun, starts) + length
        moments, inverse = np.unique(np.concatenate([starts, ends]), return_inverse=True)
        changes = np.bincount(inverse, np.repeat([1, -1], len(starts)), len(moments)).astype(np.int64)
        there = here + np.cumsum(changes)
        if not (there >= count).any():
            most = max([here, *there.tolist()])
            raise UserError(
                f"a round needs {count} devices, but never are more than {most} of those with a plan available at a "
                "time: take a smaller cohort, or other settings of clock.availability"
            )
        return float(moments[int(np.argmax(there >= count))])


def availability(kind: str, hours: float, devices: int, seed: int) -> Availability:
    """By a model, or as a file has it.

    "diurnal" is a model, not data: every device has a window a day. Its middle is normal about 3:00 with a standard
    deviation of 5.2 hours, its length uniform between half and one and a half times the mean. With 8 hours four times
    as many devices are there at the best time of the day as at the worst, as in the fleet of Bonawitz et al. (2019,
    section 9). Time begins at midnight.

    Args:
        kind: "always", "diurnal", or the path of a JSON file; see `read`.
        hours: Mean length of the window of "diurnal".
        devices: How many there are.
        seed: Of the run.

    Raises:
        UserError: The file cannot be used.
    """
    if kind not in MODELS:
        return read(Path(kind), devices)
    start, length = np.zeros(devices, dtype=np.int64), np.full(devices, DAY_SECONDS)
    if kind == "diurnal":
        rng = generator(seed, "availability")
        middle = _MIDDLE_HOURS + _SPREAD_HOURS * rng.standard_normal(devices)
        drawn = hours * rng.uniform(0.5, 1.5, devices)
        length = np.minimum(np.maximum(1, HOUR_SECONDS * drawn), DAY_SECONDS).astype(np.int64)
        start = np.floor(HOUR_SECONDS * (middle - drawn / 2)).astype(np.int64) % DAY_SECONDS
    return Availability(DAY_SECONDS, np.arange(devices), start, length, devices)


def read(path: Path, devices: int) -> Availability:
    """The traces in a JSON file: `{"period_seconds": 86400, "traces": {"anna": [[0, 3600], [80000, 86400]]}}`.

    Each trace is a list of spans [from, to) in whole seconds, ascending, within the period. Device i has trace i, in
    the order of the file; where the traces run out, they begin anew.

    Raises:
        UserError: It is missing, or not that.
    """
    accepted = " or ".join(f'"{model}"' for model in MODELS)
    if not path.is_file():
        raise UserError(f"clock.availability must be {accepted} or a JSON file; {str(path)!r} is neither")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    found: dict[str, Any] = table if isinstance(table, dict) else {}
    period, traces = found.get("period_seconds", 0), found.get("traces")
    if not _whole(period) or period < 1 or not isinstance(traces, dict) or not traces:
        raise UserError(f'{path} must be such as {{"period_seconds": 86400, "traces": {{"anna": [[0, 3600]]}}}}')
    spans = [list(_spans(path, name, trace, period)) for name, trace in traces.items()]
    rows = [(device, *span) for device in range(devices) for span in spans[device % len(spans)]]
    device, start, length = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Availability(period, device, start, length, devices)


def _spans(path: Path, name: str, trace: Any, period: int) -> Iterator[tuple[int, int]]:
    """Start and length of each span of a trace, those that touch joined."""
    joined: list[list[int]] = []
    for span in trace if isinstance(trace, list) else [trace]:
        fine = isinstance(span, list) and len(span) == 2 and all(map(_whole, span))
        earliest = joined[-1][1] if joined else 0
        if not fine or not earliest <= span[0] < span[1] <= period:
            raise UserError(
                f"{path}: {name!r} must be a list of spans [from, to) in whole seconds, each from the end of the one "
                f"before, or 0, to at most {period}; got {span!r}"
            )
        if joined and span[0] == earliest:
            joined[-1][1] = span[1]
        else:
            joined.append(list(span))
    if len(joined) > 1 and joined[0][0] == 0 and joined[-1][1] == period:
        joined[-1][1] += joined.pop(0)[1]
    yield from ((start, end - start) for start, end in joined)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**40
