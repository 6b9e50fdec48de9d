"""Networks on disk: folders in the Hugging Face GPT-2 layout (config.json + model.safetensors) <-> our names.

`transformers` loads these folders as they are. Only safetensors and JSON are read, never pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lamina import files, model
from lamina.errors import UserError
from lamina.layout import Params
from lamina.spec import Spec

WEIGHTS, CONFIG, OURS = "model.safetensors", "config.json", "lamina.safetensors"

_WANTED: dict[str, object] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
_BLOCK = {
    "norm1": "ln_1",
    "attn.o": "attn.c_proj",
    "norm2": "ln_2",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}
_OUTER = {
    "embed.tokens": "transformer.wte.weight",
    "embed.positions": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}


def read_spec(folder: Path) -> Spec:
    """The sizes of the network in `folder`, from config.json alone.

    Raises:
        UserError: The folder or the file is missing or unreadable, or the network is not one we can run.
    """
    path, config = folder / CONFIG, _read_config(folder)
    try:
        for key, value in _WANTED.items():
            given = config.get(key, value if isinstance(value, bool) else None)
            if given != value:
                raise UserError(f"{path}: {key} is {given!r}; this version runs {value!r} only")
        embed, heads = int(config["n_embd"]), int(config["n_head"])
        spec = Spec(
            blocks=int(config["n_layer"]),
            embed=embed,
            heads=heads,
            head_dim=int(config.get("head_dim", embed // heads)),
            ffn=int(config.get("n_inner") or 4 * embed),
            vocab=int(config["vocab_size"]),
            positions=int(config["n_positions"]),
            norm_eps=float(config["layer_norm_epsilon"]),
        )
        if (embed % heads and "head_dim" not in config) or not all(
            size > 0 and math.isfinite(size) for size in astuple(spec)[:8]
        ):
            raise ValueError(f"sizes must be positive, and n_embd a multiple of n_head; got {spec}")
        return spec
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{path} is not a usable network config: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing") from error


def read_alphabet(folder: Path) -> str | None:
    """The symbols of a character-level network in the order of their ids, if config.json says.

    Raises:
        UserError: As `read_spec`.
    """
    alphabet = _read_config(folder).get("alphabet")
    return None if alphabet is None else str(alphabet)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"no network at {folder}: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    try:
        theirs = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error
    if "lm_head.weight" not in theirs and "transformer.wte.weight" in theirs:
        theirs["lm_head.weight"] = theirs["transformer.wte.weight"].clone()
    layout = model.layout(spec)
    params: Params = {}
    for name in layout.params:
        tensor = _fetch(theirs, name, spec, path).float().reshape(layout.shape(name)).contiguous()
        if not tensor.isfinite().all():
            raise UserError(f"{path}: tensor for {name} holds values that are not finite")
        params[name] = tensor
    return spec, params


def write(folder: Path, spec: Spec, params: Params, dtype: torch.dtype, extra: dict[str, Any]) -> None:
    """Write the network, low-rank additions merged, as a Hugging Face folder; `extra` goes into config.json.

    What has no place in that layout, such as exits and adapters, is in lamina.safetensors beside it, by our names, with
    the sizes of the whole network in the metadata as JSON; others load the network without it. GPT-2's heads are as
    wide as the network together; where they are not (a network cut in width), config.json has a `head_dim` of ours, and
    the folder is for us alone.
    """
    whole, params = model.merged(spec, params)
    spec = replace(whole, adapter=0, exits=())
    theirs = {name: tensor.to(dtype).contiguous() for name, tensor in _theirs(spec, params)}
    files.write(folder / WEIGHTS, save(theirs, metadata={"format": "pt"}))
    if names := params.keys() - model.layout(spec).params.keys():
        ours = {name: params[name].to(dtype).contiguous() for name in sorted(names)}
        files.write(folder / OURS, save(ours, metadata={"spec": json.dumps(asdict(whole))}))
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": spec.blocks,
        "n_embd": spec.embed,
        "n_head": spec.heads,
        "n_inner": spec.ffn,
        "vocab_size": spec.vocab,
        "n_positions": spec.positions,
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if spec.heads * spec.head_dim != spec.embed:
        config["head_dim"] = spec.head_dim
    files.write_json(folder / CONFIG, config | extra)


def _fetch(theirs: dict[str, Tensor], name: str, spec: Spec, path: Path) -> Tensor:
    """One of our tensors, still in their dtype, from their dictionary: un-fused and, in blocks, un-transposed."""
    source, part = _source(name)
    if source not in theirs:
        raise UserError(f"{path}: tensor {source} is missing")
    tensor, wanted = theirs[source], _their_shape(spec, name)
    if tuple(tensor.shape) != wanted:
        raise UserError(f"{path}: {source} has shape {tuple(tensor.shape)}; {CONFIG} asks for {wanted}")
    if part is not None:
        tensor = tensor.chunk(3, dim=-1)[part]
    return tensor.T if tensor.dim() == 2 and ".h." in source else tensor


def _their_shape(spec: Spec, name: str) -> tuple[int, ...]:
    """Shape of the tensor of theirs that one of ours is in; in blocks, matrices are [in, out]."""
    layout = model.layout(spec)
    source, part = _source(name)
    if ".h." not in source:
        return layout.shape(name)
    stem, _, end = name.rpartition(".")
    rows = layout.numel(f"{stem}.bias")
    out = rows if part is None else 3 * rows
    is_vector = end == "bias" or layout.params[name].part == "norm"
    return (out,) if is_vector else (layout.numel(name) // rows, out)


def _theirs(spec: Spec, params: Params) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under their names: query, key and value fused, and weights of blocks stored [in, out]."""
    fused: dict[str, list[Tensor]] = {}
    for name in model.layout(spec).params:
        source, part = _source(name)
        tensor = params[name]
        if ".h." in source:
            rows = params[name.removesuffix("weight").removesuffix("bias") + "bias"].numel()
            tensor = (
                tensor.reshape(rows, -1).T if name.endswith("weight") and "norm" not in name else tensor.reshape(-1)
            )
        if part is None:
            yield source, tensor
        else:
            fused.setdefault(source, []).append(tensor)
    for source, tensors in fused.items():
        yield source, torch.cat(tensors, dim=-1)


def _source(name: str) -> tuple[str, int | None]:
    """Their name of one of our tensors, and its place (0, 1, 2) when theirs is query, key and value in one."""
    if name in _OUTER:
        return _OUTER[name], None
    _, block, *middle, end = name.split(".")
    short = ".".join(middle)
    if short in ("attn.q", "attn.k", "attn.v"):
        return f"transformer.h.{block}.attn.c_attn.{end}", "qkv".index(short[-1])
    return f"transformer.h.{block}.{_BLOCK[short]}.{end}", None


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
