"""Hugging Face folders as config.json and the headers of the weights say, without the weights and without torch.

Only safetensors and JSON are read, never pickle. What the families of networks are called there is in
`lamina.families`; `lamina.checkpoint` loads and writes the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina import weights
from lamina.errors import UserError
from lamina.families import family_of
from lamina.family import HEADLESS, Place, labels
from lamina.spec import Spec, layout

WEIGHTS, CONFIG, OURS = weights.FILE, "config.json", "lamina.safetensors"


def read_spec(folder: Path) -> Spec:
    """The sizes of the network in `folder`, from config.json, and at most from the headers of the weights.

    Raises:
        UserError: The folder or the file is missing or unreadable, or the network is not one we can run.
    """
    path, config = folder / CONFIG, read_config(folder)
    try:
        family = family_of(config)
        spec = family.spec(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing") from error
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path} is not a usable network config: {error}") from error
    if spec.pooler and not spec.labels and _lacks_pooler(folder, spec):
        return replace(spec, **HEADLESS)
    return spec


def read_labels(folder: Path) -> tuple[str, ...]:
    """Names of the classes in the order of the outputs; none where the network does not classify.

    Raises:
        UserError: As `read_spec`.
    """
    return labels(read_config(folder)) if read_spec(folder).labels else ()


def read_alphabet(folder: Path) -> str | None:
    """The symbols of a character-level network in the order of their ids, if config.json says.

    Raises:
        UserError: As `read_spec`.
    """
    alphabet = read_config(folder).get("alphabet")
    return None if alphabet is None else str(alphabet)


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds.

    Raises:
        UserError: It is missing, or not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"no network at {folder}: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config


def label_keys(names: Sequence[str]) -> dict[str, Any]:
    """The keys of config.json for the names of classes, in the order of the outputs."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def architecture(folder: Path) -> str:
    """The class of `transformers` whose head we read.

    Raises:
        UserError: As `read_config`, or the family is not known.
    """
    config = read_config(folder)
    return family_of(config).architecture(config)


def check(folder: Path) -> tuple[Spec, dict[str, weights.Entry]]:
    """The network in `folder`, and the tensors that it uses, each of which has been looked at.

    Raises:
        UserError: A file is missing, truncated, not safetensors, or a tensor is missing, misshapen or not finite.
    """
    spec = read_spec(folder)
    source = Source(folder, spec)
    used: dict[str, weights.Entry] = {}
    for name in source.layout.params:
        for entry, _ in source.entries_of(name):
            if entry.name not in used and not entry.is_finite():
                raise UserError(f"{entry.path}: tensor for {name} holds values that are not finite")
            used[entry.name] = entry
    return spec, used


def unused(folder: Path) -> dict[str, weights.Entry]:
    """The tensors of a folder that are in no tensor of ours, by their names: heads of other tasks, buffers.

    Raises:
        UserError: As `load`, but for values.
    """
    return Source(folder, read_spec(folder)).unused()


class Source:
    """The weights of a folder, found by our names."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        """Read the headers.

        Raises:
            UserError: As `lamina.weights.entries`.
        """
        config = read_config(folder)
        self.family = family_of(config)
        self.architecture = self.family.architecture(config)
        self.layout = layout(spec)
        self.entries = weights.entries(folder)
        self.path = folder / (WEIGHTS if (folder / WEIGHTS).is_file() else weights.INDEX)
        self.bare = not any(name.startswith(self.family.prefix) for name in self.entries)
        self.canonical = {self.family.canonical(name): entry for name, entry in self.entries.items()}
        self.tied = {"head.weight": "embed.tokens", "embed.tokens": "head.weight"}
        if spec.labels or not spec.causal:
            self.tied = {}

    def has(self, name: str) -> bool:
        """Whether the weights have all of a tensor of ours."""
        return all(place.name in self.canonical for place in self.family.places(name, self.architecture))

    def find(self, name: str) -> list[tuple[weights.Entry, Place]]:
        """Where a tensor of ours is; one that is missing is looked for where it may be tied to.

        Raises:
            UserError: It is missing.
        """
        if not self.has(name) and self.has(self.tied.get(name, name)):
            name = self.tied[name]
        places = self.family.places(name, self.architecture)
        for place in places:
            if place.name not in self.canonical:
                prefix = "" if self.bare or not place.in_base else self.family.prefix
                raise UserError(f"{self.path}: tensor {prefix}{place.name} is missing")
        return [(self.canonical[place.name], place) for place in places]

    def entries_of(self, name: str) -> list[tuple[weights.Entry, Place]]:
        """Where a tensor of ours is, in the shape and as the numbers it should be.

        Raises:
            UserError: It is missing, or something else.
        """
        found = self.find(name)
        rows = self.rows(name, len(found))
        for entry, place in found:
            wanted = self.family.stored_shape(name, rows, place)
            if entry.shape != wanted:
                raise UserError(f"{entry.path}: {entry.name} has shape {entry.shape}; {CONFIG} asks for {wanted}")
            if entry.dtype not in weights.DTYPES:
                raise UserError(
                    f"{entry.path}: {entry.name} is stored as {entry.dtype}; accepted: {', '.join(weights.DTYPES)}"
                )
        return found

    def rows(self, name: str, places: int) -> tuple[int, ...]:
        """Shape of the rows of a tensor of ours that are in one of so many places."""
        first, *rest = self.layout.shape(name)
        return (first // places, *rest)

    def unused(self) -> dict[str, weights.Entry]:
        """The tensors, by their names, that are in none of ours."""
        taken = {entry.name for name in self.layout.params for entry, _ in self.find(name)}
        return {name: entry for name, entry in self.entries.items() if name not in taken}


def _lacks_pooler(folder: Path, spec: Spec) -> bool:
    """Whether there are weights, and not those of the dense layer that the base model has by its config."""
    there = (folder / WEIGHTS).is_file() or (folder / weights.INDEX).is_file()
    return there and not Source(folder, spec).has("head.pool.weight")
