"""Networks on disk: folders in the layout of Hugging Face (config.json + safetensors) <-> our names.

`transformers` loads these folders as they are. Only safetensors and JSON are read, never pickle. What the families of
networks are called there is in `lamina.families`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lamina import files, model
from lamina.errors import UserError
from lamina.families import express
from lamina.family import HEADLESS, Family, labels
from lamina.hf import (
    CONFIG,
    OURS,
    WEIGHTS,
    Source,
    label_keys,
    read_alphabet,
    read_config,
    read_labels,
    read_spec,
    unused,
)
from lamina.layout import Params
from lamina.spec import Spec, layout, spec_from_json

__all__ = [
    "CONFIG",
    "OURS",
    "WEIGHTS",
    "label_keys",
    "load",
    "load_whole",
    "read_alphabet",
    "read_config",
    "read_labels",
    "read_manifest",
    "read_spec",
    "unused",
    "write",
]


def load(folder: Path) -> tuple[Spec, Params]:
    """The network in `folder` as fp32 tensors under our names; a tied head becomes a copy of the embedding.

    Raises:
        UserError: A file is missing, truncated, not safetensors, or a tensor is missing, misshapen or not finite.
    """
    spec = read_spec(folder)
    source = Source(folder, spec)
    return spec, {name: _fetch(source, name) for name in source.layout.params}


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
        _demand_finite(params[name], name, path)
    return whole, params


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
    the network without it. Where upper blocks are in groups, these sizes are all that is there, and what others load
    is another function. In some families the heads are as wide as the network together; where they are not (a
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
        UserError: No family has such a network, values are beyond the type, or the source cannot be read.
    """
    whole, params = model.merged(spec, params)
    core = replace(whole, adapter=0, exits=(), groups=None)
    family, architecture, config, has_head = express(core, read_config(source) if source else {})
    held = [name for name in layout(core).params if name in params and (has_head or not name.startswith("head."))]
    predicts = core.causal and not core.labels and "head.weight" in held
    tied = predicts and torch.equal(params["head.weight"], params["embed.tokens"])
    stored = [name for name in held if name != "head.weight" or not tied]
    theirs = {name: _as(dtype, name, tensor) for name, tensor in _theirs(family, architecture, stored, params)}
    carried = _carried(source, family, architecture, held) if source else {}
    files.write(folder / WEIGHTS, save(carried | theirs, metadata={"format": "pt"}))
    if (names := params.keys() - set(held)) or whole.groups:
        ours = {name: _as(dtype, name, params[name]) for name in sorted(names)}
        files.write(folder / OURS, save(ours, metadata={"spec": json.dumps(asdict(whole))}))
    config.pop("dtype", None)  # the newer name of the same
    config |= {"tie_word_embeddings": tied} if predicts else {}
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), **extra}
    if core.labels and has_head and len(labels(config)) != core.labels:
        config |= label_keys([f"LABEL_{i}" for i in range(core.labels)])
    files.write_json(folder / CONFIG, config)


def _as(dtype: torch.dtype, name: str, tensor: Tensor) -> Tensor:
    """The same numbers in another type.

    Raises:
        UserError: Some are beyond it.
    """
    stored = tensor.to(dtype).contiguous()
    if stored.numel() and tensor.isfinite().all() and not stored.isfinite().all():
        raise UserError(f"{name} has values up to {tensor.abs().max():.3g}, beyond {str(dtype)[6:]}; take another type")
    return stored


def _fetch(source: Source, name: str) -> Tensor:
    """A tensor of ours, fp32."""
    found = source.entries_of(name)
    rows, made = source.rows(name, len(found)), torch.empty(source.layout.shape(name))
    for part, (entry, place) in zip(made.chunk(len(found)), found, strict=True):
        with entry.mapped() as stored:
            part.copy_(source.family.from_stored(name, stored, place).reshape(rows))
    _demand_finite(made, name, found[0][0].path)
    return made


def _demand_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Refuse a tensor with values that are not finite.

    Raises:
        UserError: It has some.
    """
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(f"{path}: tensor for {name} holds values that are not finite")


def _theirs(
    family: Family, architecture: str, names: Iterable[str], params: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under their names and in their shapes."""
    fused: dict[str, list[tuple[int, Tensor]]] = {}
    for name in names:
        places = family.places(name, architecture)
        for tensor, place in zip(params[name].chunk(len(places)), places, strict=True):
            theirs = family.full(place, architecture)
            stored = family.to_stored(name, tensor, place)
            if place.parts == 1:
                yield theirs, stored
            else:
                fused.setdefault(theirs, []).append((place.part, stored))
                if len(fused[theirs]) == place.parts:
                    parts = [part for _, part in sorted(fused.pop(theirs), key=lambda each: each[0])]
                    yield theirs, torch.cat(parts, dim=family.fused_dim(name))


def _carried(folder: Path, family: Family, architecture: str, held: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a folder that none of those held is in, for a folder of this class: its own, or the base model's."""
    config, spec = read_config(folder), read_spec(folder)
    source = Source(folder, replace(spec, **HEADLESS))
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
