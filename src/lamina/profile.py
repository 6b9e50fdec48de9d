"""What this machine can spare for training, measured: a class of the fleet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina import checkpoint, client, model, networks, toml
from lamina.cost import cost
from lamina.errors import UserError
from lamina.fleet import DeviceClass
from lamina.job import Local
from lamina.measure import work
from lamina.plan import Plan
from lamina.units import human

SCHEMA = "lamina.profile/1"
NETWORK, TOKENS, LOCAL = "novels-6", 80, Local(batch_size=8, steps=2)
"""What is trained to measure the speed: all of a small network, as in the examples."""
_MIB = 2**20
_CGROUP = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and pages that can be dropped, of version 2 and 1."""


@dataclass(frozen=True)
class Free:
    """Memory that can still be had.

    Attributes:
        size_bytes: How much.
        bound: What bounds it: "system", or the cgroup.
    """

    size_bytes: int
    bound: str


@dataclass(frozen=True)
class Profile:
    """This machine as a device.

    Attributes:
        name: Of the class.
        free: Memory, with this process, which has everything loaded that training needs.
        reserve_bytes: Of it that is not for training.
        flops_per_second: Median over local rounds, on one thread, as devices compute.
        rounds: How many were timed.
        rates: Bytes per second to the server and from it, if that was measured.
    """

    name: str
    free: Free
    reserve_bytes: int
    flops_per_second: float
    rounds: int
    rates: tuple[float, float] | None = None

    def device_class(self) -> DeviceClass:
        """Budget and rates, rounded down: memory to a MiB, the others to three digits."""
        memory = (self.free.size_bytes - self.reserve_bytes) // _MIB
        speed = _three_digits(self.flops_per_second / 1e6)
        up, down = (f"{_three_digits(rate * 8 / 1e6)} Mbit/s" for rate in self.rates) if self.rates else (None, None)
        return DeviceClass(self.name, memory=f"{memory} MiB", speed=f"{speed} MFLOP/s", up_rate=up, down_rate=down)

    def to_table(self) -> dict[str, Any]:
        """The `[[fleet]]` table, with the keys that are known."""
        made = self.device_class()
        table = {key: getattr(made, key) for key in ("name", "memory", "speed", "up_rate", "down_rate")}
        return {key: value for key, value in table.items() if value is not None}

    def toml(self) -> str:
        """The table as text, with what was measured in comments."""
        free, reserve = human("memory_bytes", self.free.size_bytes), human("memory_bytes", self.reserve_bytes)
        notes = (
            f"# memory: {free} free ({self.free.bound}), less a reserve of {reserve}",
            f"# speed: median of {self.rounds} local rounds of {NETWORK}, one thread",
            "# up_rate and down_rate: to the server and from it, one connection"
            if self.rates
            else '# not measured: up_rate and down_rate, such as "4 Mbit/s"; without them sending takes no time',
        )
        return "\n".join(notes) + toml.dump({"fleet": [self.to_table()]})

    def to_json(self) -> dict[str, Any]:
        """What `lamina profile --json` prints; see docs/json.md."""
        return {
            "schema": SCHEMA,
            "class": self.to_table(),
            "free_bytes": self.free.size_bytes,
            "free_bound": self.free.bound,
            "reserve_bytes": self.reserve_bytes,
            "flops_per_second": self.flops_per_second,
            "timed_rounds": self.rounds,
            "not_measured": [] if self.rates else ["up_rate", "down_rate"],
        }


def profile(name: str, reserve_bytes: int, seconds: float = 2.0, root: Path = Path("/")) -> Profile:
    """Measure this machine.

    Args:
        name: Of the class.
        reserve_bytes: Memory that is not for training.
        seconds: How long local rounds are timed, after one that warms up.
        root: Where `proc` and `sys` are.

    Raises:
        UserError: No more memory is free than is to be left.
    """
    torch.set_num_threads(1)  # as devices compute
    speed, rounds = speed_of(time.perf_counter, seconds)
    free = free_memory(root)
    if free.size_bytes - reserve_bytes < _MIB:
        raise UserError(
            f"{human('memory_bytes', free.size_bytes)} of memory are free ({free.bound}), no more than the reserve of "
            f"{human('memory_bytes', reserve_bytes)}: end other programs, or give a smaller --reserve"
        )
    return Profile(name, free, reserve_bytes, speed, rounds)


def speed_of(clock: Callable[[], float], seconds: float) -> tuple[float, int]:
    """FLOP per second of the real client: predicted operations over the time that they take.

    Args:
        clock: Seconds, ever growing.
        seconds: How long to go on; three local rounds are timed at least.

    Returns:
        The median, and how many rounds were timed.
    """
    spec = checkpoint.read_spec(networks.find(NETWORK))
    everything = frozenset(model.layout(spec).params)
    plan = Plan(everything, everything)
    flops = cost(spec, plan, LOCAL, TOKENS, LOCAL.steps).flops
    job, shard = work(spec, plan, LOCAL, TOKENS)
    client.train(job.owned(), shard, spec)
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        begun = job.owned()
        tick = clock()
        client.train(begun, shard, spec)
        taken.append(clock() - tick)
    return flops / statistics.median(taken), len(taken)


def free_memory(root: Path = Path("/")) -> Free:
    """What can still be had: the least that the system and the cgroups of this process leave.

    Of a cgroup, version 1 or 2, that is its limit less its use, to which pages of files that can be dropped do not
    count; the groups above it limit it too.

    Args:
        root: Where `proc` and `sys` are.

    Raises:
        UserError: The system does not tell.
    """
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        found = [Free(int(fields["MemAvailable"].split()[0]) * 1024, "system")]
    except (OSError, KeyError) as error:
        reason = "the free memory is read from /proc/meminfo, which needs Linux: write the class by hand"
        raise UserError(reason) from error
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            tree = root / "sys/fs/cgroup" / controllers
            folders = [tree / part.strip("/") for part in (path, *map(str, Path(path).parents))]
            found += [Free(left, f"cgroup {path}") for folder in folders if (left := _left(folder)) is not None]
    return min(found, key=lambda free: free.size_bytes)


def _left(folder: Path) -> int | None:
    """Bytes that a cgroup still leaves; None where it limits nothing."""
    for limit, use, droppable in _CGROUP:
        if (most := "".join(_lines(folder / limit))).isdecimal():
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            used = int("".join(_lines(folder / use)) or 0) - int(stat.get(droppable, 0))
            return max(0, int(most) - max(0, used))
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _three_digits(value: float) -> str:
    """Rounded down: 1234.5 -> "1230", 0.56789 -> "0.567"."""
    if value >= 100:
        scale = 10 ** (len(str(int(value))) - 3)
        return str(int(value) // scale * scale)
    return f"{int(value * 1000) / 1000:g}"
