"""TOML -> frozen dataclasses, strictly. Errors name the file, the key, what is accepted and the nearest name."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lamina import files, placement, toml
from lamina.clock import Clock
from lamina.data import TASKS
from lamina.data.shakespeare import Shakespeare
from lamina.data.task import TaskTable
from lamina.errors import UserError, nearest
from lamina.fleet import DeviceClass, quantity
from lamina.job import Local
from lamina.levers import Allowed, rungs
from lamina.methods import METHODS, Method
from lamina.planner import Prefer
from lamina.pretrain import Pretrain, PretrainImages, PretrainText
from lamina.traces import Traces
from lamina.track import Name as Tracker

TRACES = "traces"
_OF_ENTRY = ("label", "networks", "local")
"""Keys of [[methods]] besides those of the method."""


@dataclass(frozen=True)
class Experiment:
    """One run: what a TOML file says, with every default filled in.

    Attributes:
        name: Of the run; the run folder starts with it.
        seed: Of everything random.
        rounds: Federated rounds.
        cohort: Devices per round, drawn without replacement.
        eval_every: Rounds between evaluations; 0 evaluates only before the first and after the last.
        eval_devices: Devices that are evaluated: so many with test examples, drawn once for the run; 0 takes all.
        validation: Share of each device's training examples, the last ones, that replace its test examples, so that
            settings can be chosen without looking at what is reported; 0 leaves both as they are. The number is
            rounded up, but everyone keeps a training example: a device with a single one is not tested.
        clip_updates: Largest Euclidean norm of the change that an update may make, over all its tensors; a larger
            change is scaled to it, so that no device moves the mean by more than its share of that. 0: no bound.
        workers: Simulated devices computed at a time; 0 takes one per core. Changes no result. On a card, one.
        levers: Ways to save memory that the planner may use, where a plan would not fit without: "none", "exact" (those
            that leave the mathematics as it is), "all", or a list of names; see `docs/levers.md`.
        enforce: Whether each device computes in a process that gets no more memory than its budget, so that one that
            needs more fails. For proof, not for speed; on Linux. Computes as `engine = "serial"`.
        engine: How devices are simulated: "serial", each as it would compute by itself, or "auto", those with equal
            plans together and frozen prefixes once, which is faster and differs by rounding; see `docs/engines.md`.
        device: Where simulated devices train and accuracy is measured: "cpu", "cuda", a card such as "cuda:1", or
            "auto": "cuda" if there is a card. Results differ by rounding, on a card perhaps from run to run; see
            `docs/engines.md`.
        precision: In which the simulation multiplies matrices, where `engine` is "auto". It is not what devices are
            priced for.
        prefix_ram: Memory in which `engine = "auto"` keeps outputs of frozen prefixes from round to round, such as
            "1 GiB"; 0 keeps none. Of a card's memory, where one trains.
        prefix_disk: Room for what does not fit there, in a temporary file.
        track: Experiment trackers that are told each round: "tensorboard", "mlflow", "wandb"; see `docs/report.md`.
            Changes no result.
        networks: Candidate networks: names of the package's, or folders.
        prefer: Which is taken of those that the budgets allow: "trained", of which devices train most blocks in the
            mean, of equals the deepest (the rule of CAFF); or "deep", the deepest that leaves fewest devices out.
        task: The `[task]` table.
        method: The `[method]` table.
        local: The `[local]` table.
        fleet: The `[[fleet]]` tables, or "traces", or the `[fleet]` table with that name.
        clock: The `[clock]` table.
    """

    name: str
    rounds: int
    cohort: int
    networks: tuple[str, ...]
    seed: int = 0
    eval_every: int = 0
    eval_devices: int = 0
    validation: float = 0.0
    clip_updates: float = 0.0
    workers: int = 0
    levers: Allowed = "none"
    enforce: bool = False
    engine: Literal["auto", "serial"] = "auto"
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    prefix_ram: str | int = "1 GiB"
    prefix_disk: str | int = "4 GiB"
    track: tuple[Tracker, ...] = ()
    prefer: Prefer = "trained"
    task: TaskTable = field(default_factory=Shakespeare)
    method: Method = field(default_factory=METHODS["caff"])
    local: Local = field(default_factory=Local)
    fleet: tuple[DeviceClass, ...] | Traces = ()
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        """Check what types alone cannot.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if self.name in ("", ".", "..") or any(letter in self.name for letter in "/\\\0"):
            raise ValueError(f"name must be a plain file name, got {self.name!r}")
        if (size := len(self.name.encode())) > files.NAME_BYTES:
            raise ValueError(f"name must have at most {files.NAME_BYTES} bytes, as folders get it; got {size}")
        for key in ("rounds", "cohort"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("eval_every", "eval_devices", "workers", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be at least 0 and less than 1, got {self.validation}")
        if not 0 <= self.clip_updates < math.inf:
            raise ValueError(f"clip_updates must be finite and not negative, got {self.clip_updates}")
        list(rungs(self.levers))
        placement.check(self.device)
        if self.enforce and self.device != "cpu":
            raise ValueError(f'enforce = true goes with device = "cpu", whose memory it limits; got {self.device!r}')
        for key in ("prefix_ram", "prefix_disk"):
            if getattr(self, key) != 0:
                quantity(key, getattr(self, key))
        if self.precision != "float32" and (self.enforce or self.engine != "auto"):
            raise ValueError(f'precision = {self.precision!r} goes with engine = "auto", without enforce')
        if self.enforce and self.method.on_infeasible == "ignore":
            raise ValueError(
                'enforce = true cannot go with method.on_infeasible = "ignore": no plan would keep its budget'
            )
        if not self.networks:
            raise ValueError("networks must name at least one network")
        self._check_fleet()

    def _check_fleet(self) -> None:
        timed = isinstance(self.fleet, Traces)
        if not isinstance(self.fleet, Traces):
            names = [each.name for each in self.fleet]
            if not names or len(set(names)) < len(names):
                raise ValueError(f"[[fleet]] needs at least one class, each with a name of its own; got {names}")
            timed = any(each.speed or each.up_rate or each.down_rate for each in self.fleet)
        if self.clock.needs_rates and not timed:
            raise ValueError(
                "clock.deadline, clock.over_selection and clock.availability need devices that take time: give classes "
                'speed, up_rate or down_rate, or take fleet = "traces"'
            )
        if self.clock.min_updates > self.cohort:
            raise ValueError(f"clock.min_updates = {self.clock.min_updates} is more than the cohort of {self.cohort}")

    def to_table(self) -> dict[str, Any]:
        """The TOML tables that make this experiment."""
        table = dataclasses.asdict(self)
        table["task"] = {"name": _name_of(TASKS, self.task)} | table["task"]
        table["method"] = {"name": _name_of(METHODS, self.method)} | table["method"]
        if isinstance(self.fleet, Traces):
            table["fleet"] = {"name": TRACES} | table["fleet"]
        return table


@dataclass(frozen=True)
class Comparison:
    """Experiments that differ in the method alone, or in little besides, each with every seed.

    Attributes:
        name: Of the comparison.
        seeds: Of the runs.
        experiments: One per method, with its label.
        target: Accuracy, mean over devices, of which is told what it cost to reach it; None: not told.
    """

    name: str
    seeds: tuple[int, ...]
    experiments: tuple[tuple[str, Experiment], ...]
    target: float | None = None


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """The comparison in a TOML file: an experiment with `seeds` and [[methods]] in the place of `seed` and [method].

    A `target` is an accuracy of which is told what it cost each method to reach it.

    Each of [[methods]] is a [method] table with, if wanted, a `label`, `networks` in the place of those at the top, and
    a `local` table whose keys go before those of [local]; where one is a list, the method is compared with each of its
    values. `on_infeasible` at the top, "drop" by default, is that of methods that do not say.

    Raises:
        UserError: The file is missing or not TOML, or a key or value is not accepted.
    """
    table, where = toml.read(path, overrides), str(path)
    if "methods" not in table:
        raise UserError(f"{where} has no [[methods]], the methods to compare; a single experiment is for `run`")
    known = [f.name for f in dataclasses.fields(Experiment) if f.name not in ("seed", "method")]
    for key in table:
        if key not in (names := [*known, "seeds", "methods", "on_infeasible", "target"]):
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, names)}")
    seeds, methods = table.pop("seeds", [0]), table.pop("methods", [])
    if not isinstance(seeds, list) or not seeds or not all(type(each) is int and each >= 0 for each in seeds):
        raise UserError(f"{where}: seeds must be a list of integers from 0 on, at least one, got {seeds!r}")
    target = table.pop("target", None)
    if target is not None and not (isinstance(target, float) and 0 < target < 1):
        raise UserError(f"{where}: target must be an accuracy between 0 and 1, such as 0.5, got {target!r}")
    if target and not table.get("eval_every"):
        raise UserError(f"{where}: target needs rounds that are evaluated on the way: set eval_every, such as 1")
    if not isinstance(methods, list) or not methods or not all(isinstance(each, Mapping) for each in methods):
        raise UserError(f"{where}: methods must be written as [[methods]] tables, one per method, at least one")
    common = {"on_infeasible": table.pop("on_infeasible", "drop")}
    experiments: dict[str, Experiment] = {}
    for number, each in enumerate(methods, 1):
        origin = f"{where}: [[methods]] {number}"
        name, own = _entry(each, table | {"method": common}, origin)
        for label, values in _grid(name, own["local"], origin):
            if label in experiments:
                raise UserError(f"{origin}: there is another {label!r}; give one of them a label")
            experiments[label] = experiment(own | {"local": values}, origin)
    first = next(iter(experiments.values()))
    return Comparison(first.name, tuple(dict.fromkeys(seeds)), tuple(experiments.items()), target)


def _entry(given: Mapping[str, Any], table: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The label of one of [[methods]], and the tables of an experiment with what it says in its place.

    Raises:
        UserError: It has no name, a key that is neither the method's nor one of `_OF_ENTRY`, or a bad label.
    """
    method = dict(given)
    own = {key: method.pop(key) for key in _OF_ENTRY if key in method}
    if "name" not in method:
        raise UserError(f"{where}: name is missing, the method's; accepted: {', '.join(METHODS)}")
    if cls := METHODS.get(str(method["name"])):
        rest = {key: value for key, value in given.items() if key != "name"}
        toml.check_keys(cls, rest, f"{where}: {method['name']}", _OF_ENTRY)
    label, local = own.pop("label", method["name"]), own.pop("local", {})
    if "label" in given and (not isinstance(label, str) or not label.strip()):
        raise UserError(f"{where}: label must be a text that is not empty, got {label!r}")
    for values in (local, table.get("local", {})):
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: local must be a table, got {values!r}")
    local = dict(table.get("local", {})) | dict(local)
    return str(label), dict(table) | own | {"method": table["method"] | method, "local": local}


def _grid(label: str, values: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A [local] table for every combination of the values of keys that are lists, with a label that names them.

    Raises:
        UserError: A list is empty.
    """
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    for key, value in lists.items():
        if not value:
            raise UserError(f"{where}: local.{key} is an empty list; give a value, or a list of those to compare")
    for point in itertools.product(*lists.values()):
        chosen = dict(zip(lists, point, strict=True))
        yield (
            ", ".join(
                [
                    label,
                    *(
                        f"{key} {value:g}" if type(value) is float else f"{key} {value}"
                        for key, value in chosen.items()
                    ),
                ]
            ),
            values | chosen,
        )


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in a TOML file, after `key.sub=value` overrides.

    Raises:
        UserError: The file is missing or not TOML, or a key or value is not accepted.
    """
    return experiment(toml.read(path, overrides), str(path))


def experiment(table: Mapping[str, Any], where: str) -> Experiment:
    """The experiment a table describes; `where` names its origin in errors.

    Raises:
        UserError: A key or value is not accepted.
    """
    table = dict(table)
    if "methods" in table:
        raise UserError(f"{where} has [[methods]]: it is for `lamina compare`")
    toml.check_keys(Experiment, table, where)
    parts: dict[str, Any] = {}
    parts["task"] = toml.build_named(TASKS, {"name": "shakespeare"}, table.pop("task", {}), f"{where}: [task]")
    parts["method"] = toml.build_named(METHODS, {"name": "caff"}, table.pop("method", {}), f"{where}: [method]")
    parts["local"] = toml.build(Local, table.pop("local", {}), f"{where}: [local]")
    parts["clock"] = toml.build(Clock, table.pop("clock", {}), f"{where}: [clock]")
    parts["fleet"] = _fleet(table.pop("fleet", []), where)
    return toml.build(Experiment, table, where, parts)


def _fleet(given: Any, where: str) -> tuple[DeviceClass, ...] | Traces:
    """Device classes, or what stands in their place."""
    if isinstance(given, list | tuple):
        return tuple(toml.build(DeviceClass, each, f"{where}: [[fleet]] {i}") for i, each in enumerate(given, 1))
    table = {"name": given} if isinstance(given, str) else given
    if not isinstance(table, Mapping) or table.get("name") != TRACES:
        raise UserError(f'{where}: fleet must be written as [[fleet]] tables, one per device class, or be "{TRACES}"')
    return toml.build_named({TRACES: Traces}, {}, table, f"{where}: [fleet]")


def load_classes(path: Path) -> tuple[DeviceClass, ...]:
    """The device classes of a TOML file, whatever else is in it.

    Raises:
        UserError: As `load_experiment`, or there is none.
    """
    found = _fleet(toml.read(path, ()).get("fleet", []), str(path))
    if isinstance(found, Traces) or not found:
        raise UserError(f"{path} has no [[fleet]] table, which says what a device can spare")
    return found


def load_pretrain(path: Path, overrides: Sequence[str] = ()) -> Pretrain:
    """The pretraining job in a TOML file, from text or images; relative paths in it are relative to the working folder.

    Raises:
        UserError: As `load_experiment`.
    """
    table, kinds = toml.read(path, overrides), (PretrainText, PretrainImages)
    found = [cls for cls in kinds if cls.source in table]
    if len(found) != 1:
        given = "both" if found else "neither"
        raise UserError(
            f"{path}: what to learn from is given as {' or '.join(cls.source for cls in kinds)}; got {given}"
        )
    return toml.build(found[0], table, str(path))


def _name_of(table: Mapping[str, type], value: object) -> str:
    return next(name for name, cls in table.items() if type(value) is cls)
