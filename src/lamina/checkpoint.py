"""Networks on disk: folders in the layout of Hugging Face (config.json + safetensors) <-> our names.

`transformers` loads these folders as they are. Only safetensors and JSON are read, never pickle. What the families of
networks are called there is in `lamina.families`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lamina import files, model, weights
from lamina.errors import UserError
from lamina.families import express, family_of
from lamina.family import HEADLESS, Family, Place, labels
from lamina.layout import Params
from lamina.spec import Spec, layout, spec_from_json

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


def load(folder: Path) -> tuple[Spec, Params]:
    """The network in `folder` as fp32 tensors under our names; a tied head becomes a copy of the embedding.

    Raises:
        UserError: A file is missing, truncated, not safetensors, or a tensor is missing, misshapen or not finite.
    """
    spec = read_spec(folder)
    source = _Source(folder, spec)
    return spec, {name: source.fetch(name) for name in source.layout.params}


def check(folder: Path) -> Spec:
    """The network in `folder`, when every tensor of it has been looked at, one at a time.

    Raises:
        UserError: As `load`.
    """
    spec = read_spec(folder)
    source = _Source(folder, spec)
    for name in source.layout.params:
        source.fetch(name)
    return spec


def architecture(folder: Path) -> str:
    """The class of `transformers` whose head we read.

    Raises:
        UserError: As `read_spec`.
    """
    read_spec(folder)
    config = read_config(folder)
    return family_of(config).architecture(config)


def load_whole(folder: Path) -> tuple[Spec, Params]:
    """As `load`, with what stands beside the network in lamina.safetensors: adapters, exits, a head of our own.

    Raises:
        UserError: As `load`; or that file is damaged, or does not belong to the network.
    """
    spec, params = load(folder)
    path = folder / OURS
    if not path.is_file():
        return spec, params
    try:
        with safe_open(path, "pt") as file:
            whole = spec_from_json(json.loads(file.metadata()["spec"]))
            params |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is truncated or not written by lamina ({error})") from error
    shape = layout(whole)
    params = {name: params[name] for name in shape.params if name in params}
    for name in shape.params:
        if name not in params or tuple(params[name].shape) != shape.shape(name):
            raise UserError(f"{path} does not belong to the network beside it: {name} is missing or has another shape")
        demand_finite(params[name], name, path)
    return whole, params


def unused(folder: Path) -> dict[str, weights.Entry]:
    """The tensors of a folder that are in no tensor of ours, by their names: heads of other tasks, buffers.

    Raises:
        UserError: As `load`, but for values.
    """
    return _Source(folder, read_spec(folder)).unused()


def write(
    folder: Path,
    spec: Spec,
    params: Params,
    dtype: torch.dtype,
    extra: Mapping[str, Any],
    source: Path | None = None,
) -> None:
    """Write the network, low-rank additions merged, as a Hugging Face folder; `extra` goes into config.json.

    What has no place in that layout, such as exits, adapters and heads that no class of `transformers` has, is in
    lamina.safetensors beside it, by our names, with the sizes of the whole network in the metadata as JSON; others load
    the network without it. In some families the heads are as wide as the network together; where they are not (a
    network cut in width), config.json has a `head_dim` of ours, and the folder is for us alone. A head that equals the
    embedding bit for bit is tied to it.

    Args:
        folder: Where to.
        spec: The network.
        params: Its tensors.
        dtype: To store them in.
        extra: Keys of config.json.
        source: Folder of the network that it comes from, if any: what its config says besides is kept, and its tensors
            that are in none of ours.

    Raises:
        UserError: No family has such a network, or the source cannot be read.
    """
    whole, params = model.merged(spec, params)
    core = replace(whole, adapter=0, exits=())
    family, architecture, config, has_head = express(core, read_config(source) if source else {})
    if not has_head:
        core = replace(core, **HEADLESS)
    held = [name for name in layout(core).params if name in params and family.places(name, architecture)]
    predicts = core.causal and not core.labels and "head.weight" in held
    tied = predicts and torch.equal(params["head.weight"], params["embed.tokens"])
    stored = [name for name in held if name != "head.weight" or not tied]
    theirs = {name: tensor.to(dtype).contiguous() for name, tensor in _theirs(family, architecture, stored, params)}
    carried = _carried(source, family, architecture, held) if source else {}
    files.write(folder / WEIGHTS, save(carried | theirs, metadata={"format": "pt"}))
    if names := params.keys() - set(held):
        ours = {name: params[name].to(dtype).contiguous() for name in sorted(names)}
        files.write(folder / OURS, save(ours, metadata={"spec": json.dumps(asdict(whole))}))
    config.pop("dtype", None)  # the newer name of the same
    config |= {"tie_word_embeddings": tied} if predicts else {}
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), **extra}
    if core.labels and len(labels(config)) != core.labels:
        config |= label_keys([f"LABEL_{i}" for i in range(core.labels)])
    files.write_json(folder / CONFIG, config)


def label_keys(names: Sequence[str]) -> dict[str, Any]:
    """The keys of config.json for the names of classes, in the order of the outputs."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


class _Source:
    """The weights of a folder, found by our names."""

    def __init__(self, folder: Path, spec: Spec) -> None:
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

    def fetch(self, name: str) -> Tensor:
        """A tensor of ours, fp32.

        Raises:
            UserError: It is missing, has another shape or type than it should, or values that are not finite.
        """
        shape, found = self.layout.shape(name), self.find(name)
        rows = (shape[0] // len(found), *shape[1:])
        for entry, place in found:
            wanted = self.family.stored_shape(name, rows, place)
            if entry.shape != wanted:
                raise UserError(f"{entry.path}: {entry.name} has shape {entry.shape}; {CONFIG} asks for {wanted}")
            if entry.dtype not in weights.DTYPES:
                raise UserError(
                    f"{entry.path}: {entry.name} is stored as {entry.dtype}; accepted: {', '.join(weights.DTYPES)}"
                )
        made = torch.empty(shape)
        for part, (entry, place) in zip(made.chunk(len(found)), found, strict=True):
            part.copy_(self.family.from_stored(name, entry.read(), place).reshape(rows))
        demand_finite(made, name, self.path)
        return made

    def unused(self) -> dict[str, weights.Entry]:
        """The tensors, by their names, that are in none of ours."""
        taken = {entry.name for name in self.layout.params for entry, _ in self.find(name)}
        return {name: entry for name, entry in self.entries.items() if name not in taken}


def demand_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Refuse a tensor with values that are not finite.

    Raises:
        UserError: It has some.
    """
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(f"{path}: tensor for {name} holds values that are not finite")


def _lacks_pooler(folder: Path, spec: Spec) -> bool:
    """Whether there are weights, and not those of the dense layer that the base model has by its config."""
    there = (folder / WEIGHTS).is_file() or (folder / weights.INDEX).is_file()
    return there and not _Source(folder, spec).has("head.pool.weight")


def _theirs(
    family: Family, architecture: str, names: Iterable[str], params: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under their names and in their shapes."""
    fused: dict[str, list[tuple[int, Tensor]]] = {}
    for name in names:
        places = family.places(name, architecture)
        for tensor, place in zip(params[name].chunk(len(places)), places, strict=True):
            theirs = (family.prefix if place.in_base and architecture != family.base else "") + place.name
            stored = family.to_stored(name, tensor, place)
            if place.parts == 1:
                yield theirs, stored
            else:
                fused.setdefault(theirs, []).append((place.part, stored))
                if len(fused[theirs]) == place.parts:
                    parts = [part for _, part in sorted(fused.pop(theirs), key=lambda each: each[0])]
                    yield theirs, torch.cat(parts, dim=family.fused_dim(stored))


def _carried(folder: Path, family: Family, architecture: str, held: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a folder that none of those held is in, for a folder of this class: its own, or the base model's."""
    config, spec = read_config(folder), read_spec(folder)
    source = _Source(folder, replace(spec, **HEADLESS))
    same = (config.get("architectures") or [None])[0] == architecture
    written = {place.name for name in held for place in family.places(name, architecture)}
    carried = {}
    for name, entry in source.unused().items():
        in_base = source.bare or name.startswith(family.prefix)
        canonical = family.canonical(name)
        if (same or in_base) and canonical not in written:
            prefix = family.prefix if in_base and architecture != family.base else ""
            carried[prefix + canonical] = entry.read()
    return carried


def read_manifest(path: Path) -> Any:
    """The JSON manifest in the header of a state file of ours.

    Raises:
        UserError: The file is truncated, or not such a file.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["manifest"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a state of lamina ({error})") from error
