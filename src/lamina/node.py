"""A real device: says what it can spare, refuses what is too much, trains, and keeps what it need not be sent again.

It knows no transport: a message comes as index and bytes, and so does the answer; see `lamina.wire`.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lamina import client, config, files, model, networks, toml, wire
from lamina.config import Experiment
from lamina.cost import cost
from lamina.data.task import Shard
from lamina.errors import UserError, nearest
from lamina.experiment import load_task
from lamina.flash import Flash
from lamina.fleet import RESOURCES, Budget, DeviceClass
from lamina.job import Job, Update
from lamina.spec import Spec
from lamina.units import human
from lamina.wire import Message, WireError

STATE = "state"
"""Of a job: the round of which the device is to go on with the state, or -1. Of an update: whether it kept one."""


@dataclass(frozen=True)
class NodeTable:
    """What a device's owner says: the node config.

    Attributes:
        device: Index of the device in the experiment, from 0.
        experiment: TOML file on the device, as `lamina run` takes it: its data, the networks it knows, the classes.
        shard: Which of that data is its own, by the index of a device; -1: that of `device`.
        class_name: Its class among those of `experiment`.
        profile: TOML file with its class, as `lamina profile` writes it.
        cache: Folder for what it keeps; "": `lamina-device-<device>` in the working folder.
    """

    device: int
    experiment: str
    shard: int = -1
    class_name: str = ""
    profile: str = ""
    cache: str = ""


class Shelf(Flash):
    """Tensors on disk, each in a file of its own that is called by its SHA-256."""

    def __init__(self, folder: Path, names: Mapping[str, str]) -> None:
        """Open no file yet. `names` are tensors and their SHA-256."""
        self.path, self._names = folder, names

    def _flash(self, name: str) -> Flash:
        return Flash(self.path / f"{self._names[name]}.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        """One tensor."""
        return self._flash(name)[""]

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return self._flash(name).shape("")

    def rows(self, name: str, indices: Any) -> Tensor:
        """Some rows of a tensor."""
        return self._flash(name).rows("", indices)

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)


class Cache:
    """What a device has received: the last version of every tensor, on its disk."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made where there is none."""
        self._folder, self._index = folder / "tensors", folder / "tensors.json"
        self._folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> dict[str, str]:
        """Tensors and their SHA-256; those that are not what they were are left out."""
        try:
            said = json.loads(self._index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {name: sha256 for name, sha256 in said.items() if self._whole(sha256)}

    def _whole(self, sha256: str) -> bool:
        try:
            return wire.digest(Flash(self._folder / f"{sha256}.safetensors")[""]) == sha256
        except (OSError, ValueError, KeyError):
            return False

    def take(self, message: Message, names: MutableMapping[str, str]) -> Shelf:
        """Keep what a message brought instead of older versions, on disk alone; returns all tensors it names.

        Args:
            message: It gives its tensors away.
            names: What is here; at the end, what is here then.
        """
        while message.tensors:
            name, tensor = message.tensors.popitem()
            names[name] = message.rows[name].sha256
            (self._folder / f"{names[name]}.safetensors").write_bytes(
                save({"": tensor})
            )  # half a file is none: `names`
        files.write_json(self._index, names)
        for path in self._folder.iterdir():
            if path.stem not in names.values():
                path.unlink()
        return Shelf(self._folder, {name: row.sha256 for name, row in message.rows.items()})


class Node:
    """A device and its owner's settings."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read the settings and what they name.

        Raises:
            UserError: A setting is not accepted, or a file cannot be used.
        """
        given = {key.replace("-", "_"): value for key, value in settings.items()}
        self.table = toml.build(NodeTable, given, "node config")
        self.experiment: Experiment = config.load_experiment(Path(self.table.experiment))
        self.said = self._class()
        self.budget = self.said.budget if self.said else Budget()
        self._folder = Path(self.table.cache or f"lamina-device-{self.table.device}")
        self.cache = Cache(self._folder)

    def _class(self) -> DeviceClass | None:
        table = self.table
        if table.class_name and table.profile:
            raise UserError("node config: class-name and profile both say what the device can spare: take one of them")
        if table.profile:
            return config.load_classes(Path(table.profile))[0]
        if not table.class_name:
            return None
        classes = {each.name: each for each in config.load_classes(Path(table.experiment))}
        if table.class_name not in classes:
            raise UserError(f"node config: no class {table.class_name!r}; {nearest(table.class_name, classes)}")
        return classes[table.class_name]

    @cached_property
    def shard(self) -> Shard:
        """The device's examples."""
        shards, index = load_task(self.experiment).train, self.table.shard
        index = self.table.device if index < 0 else index
        if index >= len(shards):
            raise UserError(f"node config: shard {index} of {len(shards)}: they are counted from 0")
        return shards[index]

    def hello(self) -> tuple[str, bytes]:
        """What the device can spare, and has."""
        return wire.pack(
            {
                "device": self.table.device,
                "class": self.said.name if self.said else "",
                "budget": asdict(self.budget),
                "examples": len(self.shard),
                "known": self.cache.names(),
                "seconds": time.time(),
            }
        )

    def answer(self, index: str, data: bytes) -> tuple[str, bytes]:
        """The answer to a job, whatever comes of it; what went wrong is on standard error, and stays here."""
        try:
            with files.at_work(self._folder):
                message = wire.unpack(index, data)
                known = self.cache.names()
                if any(not row.sent and known.get(name) != row.sha256 for name, row in message.rows.items()):
                    return wire.pack({"answer": "lacks", "known": known})
                update = self._train(message, known)
                return wire.pack(wire.answer_to_json(update) | {STATE: bool(update.state)}, update.arrays)
        except (WireError, UserError) as error:
            return _failed(str(error))
        except Exception as error:  # its text may tell of the data
            traceback.print_exc(file=sys.stderr)
            return _failed(f"its client failed: {type(error).__name__}")

    def _train(self, message: Message, known: MutableMapping[str, str]) -> Update:
        """Train as a job says.

        Raises:
            UserError: The device does not do that.
            WireError: It is no job.
        """
        bases = {networks.digest(networks.find(name)): name for name in self.experiment.networks}
        if (base := message.get("base", str)) not in bases:
            raise UserError(f"base mismatch: the server's network {wire.short(base)} is none that this device knows")
        job, spec = wire.job_from_json(message.head, {}, {})
        self._demand_affordable(job, spec)
        _demand_planned(message, job, spec)
        states = self._folder / "states" / files.digest(message.get("run", str).encode())[:16]
        state = _take_state(states, message.get(STATE, int))
        torch.set_num_threads(1)  # the number of threads changes the last bits
        update = client.train(replace(job, arrays=self.cache.take(message, known), state=state), self.shard, spec)
        if update.state:
            content = save({name: tensor.contiguous() for name, tensor in update.state.items()})
            files.write(states / f"{job.turn.round}.safetensors", content)
        return update

    def _demand_affordable(self, job: Job, spec: Spec) -> None:
        if job.turn.device != self.table.device:
            raise UserError(f"the job is for device {job.turn.device}, this is device {self.table.device}")
        steps = job.local.round_steps(len(self.shard))
        price = cost(spec, job.plan, job.local, self.experiment.task.window, steps, job.method)
        if exceeded := self.budget.exceeded(price):
            needs = (
                f"{human(key, getattr(price, key), up=True)} of {RESOURCES[key]}, "
                f"its budget is {human(key, getattr(self.budget, key))}"
                for key in exceeded
            )
            raise UserError(f"refuses a plan that needs {' and '.join(needs)}")


def _demand_planned(message: Message, job: Job, spec: Spec) -> None:
    """Refuse tensors that are not those of the plan.

    Raises:
        WireError: Naming the first.
    """
    layout = model.layout(job.plan.runs(spec))
    if odd := sorted(message.rows.keys() ^ job.plan.holds):
        raise WireError(f"the job {'has' if odd[0] in message.rows else 'lacks'} tensor {odd[0]}, against its plan")
    for name, row in message.rows.items():
        if row.dtype != torch.float32 or row.shape != job.plan.shape(layout, name):
            raise WireError(f"the job's {name} is {row.dtype} {row.shape}, against its plan")


def _take_state(folder: Path, kept: int) -> Mapping[str, Tensor]:
    """What the device kept in that round; nothing if it is gone. What it kept in others is dropped."""
    for path in list(folder.glob("*.safetensors")):
        if path.stem != str(kept):
            path.unlink()
    path = folder / f"{kept}.safetensors"
    return Flash(path) if path.is_file() else {}


def _failed(reason: str) -> tuple[str, bytes]:
    return wire.pack({"answer": "failure", "reason": reason})
