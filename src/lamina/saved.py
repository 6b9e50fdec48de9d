"""The state of a run on disk: state.safetensors, the lines that belong to it, and what must be as it was to go on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from safetensors.torch import load_file

from lamina import checkpoint, files, toml
from lamina.errors import UserError
from lamina.layout import Params
from lamina.metrics import Score
from lamina.state import State

FILE, SCHEMA = "state.safetensors", "lamina.state/3"
LINES = ("rounds.jsonl", "devices.jsonl")
_FREE = {"name", "workers", "track", "device", "networks", "task.path", "task.test_path", "clock.availability"}
"""Keys of config.toml that may be edited after a stop: they change no result, or what they name is checked itself."""


@dataclass(frozen=True)
class Premises:
    """What a run was begun with, and has to have again to go on.

    Attributes:
        settings: See `settings`.
        task_sha256: Of the data.
        availability_sha256: Of when devices are there.
    """

    settings: dict[str, str]
    task_sha256: str
    availability_sha256: str

    def demand(self, folder: Path, found: Premises) -> None:
        """Refuse to go on with the run in `folder` on other premises.

        Raises:
            UserError: Naming what was changed.
        """
        _demand_settings(folder / "config.toml", self.settings, found.settings)
        if self.task_sha256 != found.task_sha256:
            raise UserError(f"the data is not what it was when the run in {folder} was stopped")
        if self.availability_sha256 != found.availability_sha256:
            raise UserError(f"clock.availability is not what it was when the run in {folder} was stopped")


@dataclass(frozen=True)
class Saved:
    """What the file holds.

    Attributes:
        state: Between two rounds.
        before: Accuracy before the first.
        after: Accuracy after the last, once that is known.
        seconds: Wall time so far.
        premises: Those of the run.
    """

    state: State
    before: Score
    after: Score | None
    seconds: float
    premises: Premises


def write(folder: Path, saved: Saved) -> None:
    """Replace the state in `folder` at once, with the length that the files of lines have now."""
    data, tensors = saved.state.pack()
    scores = {"before": saved.before} | ({"after": saved.after} if saved.after else {})
    for when, score in scores.items():
        tensors[f"score:{when}"] = torch.from_numpy(np.stack([score.correct, score.total]))
    manifest = data | {
        "schema": SCHEMA,
        "scores": list(scores),
        "seconds": saved.seconds,
        "lengths": {name: _length(folder / name) for name in LINES},
        "sha256": _digest(tensors),
        **vars(saved.premises),
    }
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    files.write(folder / FILE, save(arrays, metadata={"manifest": json.dumps(manifest)}))


def read(folder: Path) -> Saved:
    """The state in `folder`.

    Raises:
        UserError: It is of another version of lamina, or damaged.
    """
    manifest = checkpoint.read_manifest(folder / FILE)
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{folder} has state {manifest.get('schema')!r}; this version reads {SCHEMA!r}")
    tensors = load_file(folder / FILE)
    names = {*manifest["tensors"], *(f"score:{when}" for when in manifest["scores"])}
    if tensors.keys() ^ names or _digest(tensors) != manifest["sha256"]:
        raise UserError(f"the state in {folder} is damaged: its tensors are not those that were written")
    scores = {when: Score(*tensors[f"score:{when}"].numpy()) for when in manifest["scores"]}
    premises = Premises(
        manifest.get("settings", settings(folder)), manifest["task_sha256"], manifest["availability_sha256"]
    )
    state = State.unpack(manifest, tensors)
    return Saved(state, scores["before"], scores.get("after"), manifest["seconds"], premises)


def settings(folder: Path) -> dict[str, str]:
    """What config.toml sets but for `_FREE`, as JSON; without defaults, which another version may have more of."""
    found = toml.flat(toml.read(folder / "config.toml"))
    return {key: json.dumps(value, default=str) for key, value in found if key not in _FREE}


def lengths(folder: Path) -> dict[str, int]:
    """Bytes of the files of lines in `folder` that belong to rounds whose state is written."""
    path = folder / FILE
    found: dict[str, Any] = checkpoint.read_manifest(path)["lengths"] if path.exists() else {}
    return {name: found.get(name, 0) for name in LINES}


def cut(folder: Path) -> None:
    """Drop what was written for a round that did not come to its end.

    Raises:
        UserError: A file of lines lacks some that belong to the state.
    """
    for name, length in lengths(folder).items():
        path = folder / name
        if _length(path) < length:
            raise UserError(
                f"{path} has {_length(path)} bytes, fewer than the {length} that the state of the run counts"
            )
        if path.exists():
            os.truncate(path, length)
    for left_over in folder.glob(f".{FILE}.*"):
        left_over.unlink()


def _demand_settings(path: Path, begun: dict[str, str], found: dict[str, str]) -> None:
    keys = sorted(key for key in begun.keys() | found.keys() if begun.get(key) != found.get(key))
    if keys:
        changes = [f"{key} was {begun.get(key, 'not set')}, is {found.get(key, 'not set')}" for key in keys]
        raise UserError(
            f"{path} was edited after the run had begun: {'; '.join(changes)}; put it back to go on with the run, or"
            f" begin another with: lamina run {path}"
        )


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(params: Params) -> str:
    return files.digest(b"".join(params[name].numpy().tobytes() for name in sorted(params)))
