"""Low-rank additions as an adapter of `peft`: adapter_config.json and adapter_model.safetensors.

Two linears of ours may be parts of one of theirs (GPT-2's query, key and value): with A's below one another and B's on
the diagonal of a block matrix, the larger pair adds the same to each part. Its rank is the sum of theirs, and so is
alpha, which leaves the scale alpha / r alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lamina import checkpoint, files
from lamina.errors import UserError
from lamina.families import express
from lamina.family import HEADLESS, Family
from lamina.layout import Params
from lamina.spec import Spec, layout, plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PATH = "base_model.model."


def write(folder: Path, source: Path, spec: Spec, params: Params, base: str) -> None:
    """Write the low-rank additions of a network, and its head if it is not the source's, as an adapter.

    Args:
        folder: Where to.
        source: Folder of the network that they are added to.
        spec: The network with its additions.
        params: Its tensors.
        base: What the adapter is to call the source.

    Raises:
        UserError: The network is not the source and low-rank additions alone; says what else there is.
    """
    assert spec.lora
    network, before = plain(spec), checkpoint.load(source)[1]
    _demand_nothing_else(spec, params, before)
    family, architecture, _, has_head = express(network, checkpoint.read_config(source))
    if not has_head:
        network = replace(network, **HEADLESS)
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for module, parts in _modules(family, architecture, spec, params).items():
        a, b = _joined(params, parts)
        ranks[module] = len(a)
        tensors |= {f"{_PATH}{module}.lora_A.weight": a, f"{_PATH}{module}.lora_B.weight": b}
    saved: list[str] = []
    for name in (name for name in layout(network).params if name.startswith("head.")):
        if spec.labels or name not in before or not torch.equal(before[name], params[name]):
            (place,) = family.places(name, architecture)
            theirs = family.full(place, architecture)
            tensors[_PATH + theirs] = family.to_stored(name, params[name], place)
            saved.append(theirs.removeprefix(family.prefix).split(".")[0])
    about = {
        "peft_type": "LORA",
        "task_type": _task(network),
        "base_model_name_or_path": base,
        "r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family.transposed,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != spec.lora.rank},
        "alpha_pattern": {
            module: spec.lora.alpha * rank / spec.lora.rank for module, rank in ranks.items() if rank != spec.lora.rank
        },
        "modules_to_save": sorted(set(saved)) or None,
    }
    files.write(folder / WEIGHTS, save({n: t.contiguous() for n, t in tensors.items()}, metadata={"format": "pt"}))
    files.write_json(folder / CONFIG, about)


def _task(spec: Spec) -> str | None:
    """What peft calls the kind of network; it has no word for one that classifies images."""
    if spec.labels:
        return None if spec.patch else "SEQ_CLS"
    return "CAUSAL_LM" if spec.causal else "FEATURE_EXTRACTION"


def _demand_nothing_else(spec: Spec, params: Params, before: Params) -> None:
    """Raise a UserError that says what is not as in the source, head and low-rank additions apart."""
    if spec.adapter or spec.exits:
        raise UserError("it has bottlenecks or exits besides, which peft's LoRA has not")
    if spec.factored or any(values.any() for name, values in params.items() if name.endswith(".sparse")):
        raise UserError("its linears have changed besides, not by low-rank additions alone")
    for name in layout(plain(spec)).params:
        same = name in before and before[name].shape == params[name].shape and torch.equal(before[name], params[name])
        if not same and not name.startswith("head."):
            raise UserError(f"{name} is not as in the network that it began as")


def _modules(family: Family, architecture: str, spec: Spec, params: Params) -> dict[str, list[str | None]]:
    """Their linears with additions -> ours that they are made of, in order; None for those without."""
    found: dict[str, list[str | None]] = {}
    for i in range(spec.blocks):
        for short in spec.linears:
            name = f"h.{i}.{short}"
            module, place = family.module(i, short, architecture)
            parts = found.setdefault(module, [None] * place.parts)
            parts[place.part] = name if f"{name}.lora_a" in params else None
    return {module: parts for module, parts in found.items() if any(parts)}


def _joined(params: Params, parts: list[str | None]) -> tuple[Tensor, Tensor]:
    """A [ranks, inputs] and B [outputs, ranks] of one of their linears; its parts have as many outputs each."""
    named = [(part, name) for part, name in enumerate(parts) if name]
    joined = torch.cat([params[f"{name}.lora_a"].flatten(1) for _, name in named])
    blocks = {part: params[f"{name}.lora_b"].flatten(0, -2) for part, name in named}
    outputs, rank = blocks[named[0][0]].shape
    diagonal = torch.zeros(len(parts) * outputs, len(named) * rank)
    for place, (part, b) in enumerate(blocks.items()):
        diagonal[part * outputs : (part + 1) * outputs, place * rank : (place + 1) * rank] = b
    return joined, diagonal
