"""Systems take turns at a workload, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from lamina import files
from lamina.bench import systems
from lamina.bench.play import Played, PlayError, demand_linux, play
from lamina.bench.runners.request import NETWORK
from lamina.bench.runners.rounds import WEIGHTS
from lamina.bench.systems import OURS, PEERS, SYSTEMS
from lamina.bench.workloads import WORKLOADS, prepare
from lamina.errors import UserError, nearest
from lamina.machine import environment
from lamina.placement import card, check, place

SCHEMA, RECORD_SCHEMA = "lamina.bench/1", "lamina.bench-record/1"
TOLERANCE = 1e-3
"""Largest `difference` of weights after the first rounds."""
MEASURED = ("cpu_seconds", "wall_seconds", "peak_rss_bytes", "start_seconds", "weights_differ", "rounds")
"""What there is of a system that played."""


@dataclass(frozen=True)
class Contest:
    """What is timed, and how often.

    Attributes:
        workload: Name.
        against: Systems besides ours; none: those that the workload is made for.
        overrides: Settings as `--set` takes them.
        rounds: Timed rounds of a turn.
        warmup: Rounds before them.
        settle: More rounds before them, of ours alone, which keeps things across rounds: what it takes when most
            devices have been seen. The others keep nothing.
        repeats: Turns of each system.
        workers: Devices computed at a time, by those that can.
        device: Where they compute; see `lamina.placement.place`.
        tolerance: See `TOLERANCE`.
    """

    workload: str
    against: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    rounds: int = 3
    warmup: int = 1
    settle: int = 0
    repeats: int = 3
    workers: int = 1
    device: str = "cpu"
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        """Refuse what cannot be done.

        Raises:
            UserError: Naming the option, what was given and what is accepted.
        """
        if self.workload not in WORKLOADS:
            raise UserError(f"no workload {self.workload!r}; {nearest(self.workload, WORKLOADS)}")
        for name in self.against:
            if name not in PEERS:
                raise UserError(f"--against: no system {name!r}; {nearest(name, PEERS)}")
        for key in ("rounds", "warmup", "repeats", "workers"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key} must be at least 1, got {getattr(self, key)}")
        if self.settle < 0:
            raise UserError(f"--settle must not be negative, got {self.settle}")
        try:
            check(self.device)
        except ValueError as error:
            raise UserError(f"--{error}") from error
        able = [name for name in PEERS if SYSTEMS[name].cards]
        if self.device != "cpu" and (idle := sorted({*self.against} - {*able})):
            raise UserError(f"--against: {idle[0]} plays on the cpu alone; with --device, take {' or '.join(able)}")
        if not self.tolerance > 0:
            raise UserError(f"--tolerance must be above 0, got {self.tolerance}")

    @property
    def names(self) -> tuple[str, ...]:
        """The systems, ours first."""
        chosen = self.against or WORKLOADS[self.workload].against
        return (OURS, *dict.fromkeys(name for name in chosen if self.device == "cpu" or SYSTEMS[name].cards))

    def before(self, name: str) -> int:
        """Rounds of a turn of a system before the timed ones."""
        return self.warmup + self.settle * (name == OURS)

    def turn_rounds(self, name: str) -> int:
        """Rounds of a turn of a system, those before the timed ones included."""
        return self.before(name) + self.rounds

    @property
    def all_rounds(self) -> int:
        """Of all systems in all turns."""
        return self.repeats * sum(map(self.turn_rounds, self.names))

    @property
    def label(self) -> str:
        """What tells its result from others in a record."""
        more = [f"workers={self.workers}"] if self.workers > 1 else []
        more += [f"settle={self.settle}"] if self.settle else []
        more += [f"device={self.device}"] if self.device != "cpu" else []
        return ", ".join([self.workload, *more, *self.overrides])


class Teller(Protocol):
    """Shows how a contest goes."""

    def say(self, text: str) -> None:
        """One line."""

    def advance(self, note: str, rounds: int) -> None:
        """So many more rounds are over, or need not be played."""


@dataclass
class _Entry:
    """A system that takes part.

    Attributes:
        name: Of the system.
        python: Its interpreter.
        fault: Why it has no result, if it has none.
        turns: What came of each.
        apart: How far its weights were from ours, in each turn.
    """

    name: str
    python: Path = Path()
    fault: str | None = None
    turns: list[Played] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)


def hold(contest: Contest, tell: Teller) -> dict[str, Any]:
    """Let all systems play.

    A system that cannot be installed, or fails, is left out and says why; the others still play.

    Args:
        contest: Of which workload.
        tell: Told how it goes.

    Returns:
        What `lamina bench --json` prints; documented in docs/json.md.

    Raises:
        UserError: A setting is not accepted, this is not Linux, or lamina itself failed.
    """
    demand_linux()
    device = place(contest.device)
    load = os.getloadavg()[0]
    with TemporaryDirectory(prefix="lamina-bench-") as folder:
        folders = {rounds: Path(folder) / str(rounds) for rounds in map(contest.turn_rounds, contest.names)}
        for rounds, path in folders.items():  # the first rounds are the same in all
            path.mkdir()
            work = WORKLOADS[contest.workload], contest.workload, path
            prepare(*work, rounds, contest.workers, contest.overrides, str(device))
        entries = [_entered(name, tell) for name in contest.names]
        for number in range(1, contest.repeats + 1):
            with TemporaryDirectory(prefix="lamina-bench-") as outs:
                for entry in entries:
                    if entry.fault is None:
                        asked = folders[contest.turn_rounds(entry.name)]
                        _take_turn(contest, entry, number, asked, Path(outs), tell)
                    else:
                        tell.advance(entry.name, contest.turn_rounds(entry.name))
    return _result(contest, entries) | {"machine": machine() | {"card": card(device), "load_before": round(load, 2)}}


def _entered(name: str, tell: Teller) -> _Entry:
    """A system with its environment, or with what is wrong with that."""
    if systems.missing(name):
        tell.say(f"making the environment of {name} in {systems.cache() / name}; this is done once")
    try:
        return _Entry(name, systems.environment(name))
    except UserError as error:
        tell.say(f"warning: {error}")
        return _Entry(name, fault=str(error))


def _take_turn(contest: Contest, entry: _Entry, number: int, folder: Path, outs: Path, tell: Teller) -> None:
    """Let a system play all rounds once, and compare its weights with ours of the same turn."""
    out, note = outs / entry.name, f"{entry.name}, turn {number}/{contest.repeats}"
    out.mkdir()
    started = systems.command(entry.name, entry.python, folder, out)
    tell.advance(note, 0)
    try:
        played = play(*started, contest.turn_rounds(entry.name), out, lambda: tell.advance(note, 1))
    except PlayError as error:
        if entry.name == OURS:
            raise UserError(f"lamina itself did not play: {error}") from error
        tell.say(f"warning: {note}: {error}")
        entry.fault = str(error)
        return
    entry.turns.append(played)
    before = contest.before(entry.name)
    cpu, wall = (median(each[before:]) for each in (played.cpu_seconds, played.wall_seconds))
    tell.say(f"{note}: {cpu:.2f} s of CPU, {wall:.2f} s a round")
    paths = (folder / NETWORK, outs / OURS, out)
    entry.apart.append(difference(*(load_file(path / WEIGHTS) for path in paths)))


def difference(start: Mapping[str, Tensor], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """How far weights are apart, beside how far they went: |ours - theirs| / max(|ours - start|, |theirs - start|).

    Lengths are Euclidean, over all weights together: a norm moves by little more than its own rounding. Biases of keys
    are left out: attention does not depend on them, so that their gradient is nothing but rounding, of which AdamW
    makes steps as large as any.

    Args:
        start: Weights before the first round, by their names in transformers.
        ours: After the rounds.
        theirs: The same.

    Returns:
        0 for the same bits; infinity if a tensor is missing or not finite.
    """
    if not start.keys() == ours.keys() == theirs.keys():
        return math.inf
    one, other = (_changes(start, weights) for weights in (ours, theirs))
    apart, scale = float((one - other).norm()), float(max(one.norm(), other.norm()))
    if not math.isfinite(apart):
        return math.inf
    return apart / scale if scale else 0.0


def _changes(start: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """What became of all weights but the biases of keys, float64 [weights]."""
    parts = []
    for name, before in start.items():
        change = weights[name].double() - before.double()
        if name.endswith("attn.c_attn.bias"):
            queries, _, values = change.chunk(3)
            change = torch.cat([queries, values])
        parts.append(change.flatten())
    return torch.cat(parts)


def _result(contest: Contest, entries: Sequence[_Entry]) -> dict[str, Any]:
    found = {entry.name: _measured(contest, entry) for entry in entries}
    ours = found[OURS]
    for row in found.values():
        for key in ("cpu_seconds", "wall_seconds", "peak_rss_bytes"):
            row["to_ours"][key] = None if row["fault"] else row[key] / ours[key]
    settings = asdict(contest)
    name = settings.pop("workload")
    del settings["against"]
    about = {"name": name, "about": WORKLOADS[name].about}
    return {"schema": SCHEMA, "label": contest.label, "workload": about, "settings": settings, "systems": found}


def _measured(contest: Contest, entry: _Entry) -> dict[str, Any]:
    """The row of a system."""
    row: dict[str, Any] = {
        "about": SYSTEMS[entry.name].about,
        "packages": list(SYSTEMS[entry.name].packages),
        "workers": contest.workers if SYSTEMS[entry.name].parallel else 1,
        "fault": entry.fault,
        "to_ours": {},
    }
    if entry.fault is not None:
        return row | dict.fromkeys(MEASURED)
    before = contest.before(entry.name)
    cpu, wall = ([getattr(turn, key)[before:] for turn in entry.turns] for key in MEASURED[:2])
    medians = [median(each for turn in turns for each in turn) for turns in (cpu, wall)]
    return row | {
        "cpu_seconds": medians[0],
        "wall_seconds": medians[1],
        "peak_rss_bytes": max(turn.peak_rss_bytes for turn in entry.turns),
        "start_seconds": max(0.0, median(turn.first_seconds for turn in entry.turns) - medians[1]),
        "weights_differ": max(entry.apart),
        "rounds": {"cpu_seconds": cpu, "wall_seconds": wall},
    }


def disagreeing(result: Mapping[str, Any]) -> list[str]:
    """Systems whose weights are further from ours than the tolerance."""
    most, rows = result["settings"]["tolerance"], result["systems"]
    return [name for name, row in rows.items() if row["fault"] is None and not row["weights_differ"] <= most]


def machine() -> dict[str, Any]:
    """What the timings depend on: versions, processor, cores, memory."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return environment() | {"cpu": names[0] if names else "unknown", "memory_bytes": memory_bytes}


def record(path: Path, result: Mapping[str, Any]) -> None:
    """Add a result to a file of results, in the place of an earlier one of the same label.

    Raises:
        UserError: There is a file that holds something else.
    """
    results: dict[str, Any] = {}
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] != RECORD_SCHEMA:
                raise ValueError(f"its schema is {found['schema']!r}")
            results = dict(found["results"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"--record: {path} holds no results of lamina bench ({error})") from error
    results[result["label"]] = result
    files.write_json(path, {"schema": RECORD_SCHEMA, "results": dict(sorted(results.items()))})
