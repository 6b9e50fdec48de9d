"""Predicted against measured peak of live tensor bytes, over a grid of networks, plans, levers and settings.

    python benchmarks/memory.py benchmarks/memory.json
    python benchmarks/memory.py benchmarks/memory_families.json --grid families

Every combination of GRID is one cell; its levers and its optimizer are drawn, so that each meets each of the others
many times. A second grid, OTHER, has shapes that the first has not. A grid of its own has networks of all FAMILIES. A
cell runs two real steps on random weights and examples in this process and watches every tensor that torch makes. The
same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lamina import files, model
from lamina.cost import cost
from lamina.job import Local, Turn
from lamina.levers import Levers
from lamina.machine import environment
from lamina.measure import watch
from lamina.methods import METHODS
from lamina.plan import Plan
from lamina.spec import Spec
from lamina.turn import generator

GRID: dict[str, tuple[Any, ...]] = {
    "embed": (64,),
    "depth": (3, 6, 12),
    "tokens": (64, 128, 512),
    "batch": (1, 8, 32),
    "vocabulary": (96, 8192, 50257),
    "method": ("caff", "lora", "fedavg"),
    "trained": ("one", "half", "all"),
}
OTHER: dict[str, tuple[Any, ...]] = {
    "embed": (48, 160),
    "depth": (4, 7),
    "tokens": (37, 200),
    "batch": (3, 13),
    "vocabulary": (257, 3001),
    "method": ("caff", "lora", "fedavg"),
    "trained": ("one", "half", "all"),
}
TEXT: dict[str, Any] = {"norm_eps": 1e-12, "act": "gelu", "causal": False, "post_norm": True, "embed_norm": True}
TEXT |= {"final_norm": False, "labels": 20, "pool": "first", "pooler": "tanh", "head_bias": True}
IMAGE: dict[str, Any] = {"vocab": 0, "act": "gelu", "causal": False, "patch": 4, "leads": 1, "labels": 20}
IMAGE |= {"pool": "first", "head_bias": True}
GATED: dict[str, Any] = {"norm": "rms", "act": "silu", "gated": True, "biases": (), "rotary": 1e4, "kv_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2, classes": {"labels": 20, "pool": "last"},
    "bert": TEXT | {"types": 2},
    "roberta": TEXT | {"types": 1, "first_position": 2},
    "distilbert": TEXT | {"pooler": "relu"},
    "minilm": TEXT | {"types": 2, "pool": "mean", "pooler": ""},
    "vit": IMAGE,
    "deit": IMAGE | {"leads": 2},
    "dinov2": IMAGE | {"registers": 4, "layer_scale": True, "pool": "first_mean"},
    "llama": GATED,
    "qwen2": GATED | {"biases": ("attn.q", "attn.k", "attn.v")},
    "qwen3": GATED | {"qk_norm": True},
}
FAMILY_GRID: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    "embed": (96,),
    "depth": (4,),
    "tokens": (64, 256),
    "batch": (1,),
    "vocabulary": (1000,),
    "method": ("caff", "lora", "fedavg"),
    "trained": ("one", "half", "all"),
}
GRIDS = {"grid": GRID, "other": OTHER, "families": FAMILY_GRID}
PLAIN = ("grid", "other")
EXACT = {"chunked_loss": True, "fused_update": True, "prefix_cache": "disk", "recompute": True}
LEVERS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"chunked_loss": True},
    {"fused_update": True},
    {"prefix_cache": "ram"},
    {"prefix_cache": "disk"},
    {"micro_batch": 1},
    {"micro_batch": 4},
    {"recompute": True},
    EXACT,
    EXACT,
    EXACT | {"micro_batch": 2},
    EXACT | {"frozen_bits": 8},
    {"frozen_bits": 16, "prefix_cache": "ram", "cache_bits": 16},
    {"frozen_bits": 8},
    {"optimizer": "adamw8", "fused_update": True},
    {"optimizer": "adafactor", "recompute": True},
)
OPTIMIZERS = ("adamw", "adamw", "sgd", "momentum", "adamw8", "adafactor")


def main() -> None:
    """Measure all cells and write them."""
    parser = argparse.ArgumentParser(description="Predicted against measured peaks.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--grid", choices=list(GRIDS), action="append", help="by default all of GPT-2")
    arguments = parser.parse_args()
    path, grids = arguments.path, arguments.grid or PLAIN
    torch.set_num_threads(1)
    cells = json.loads(path.read_text())["cells"] if path.exists() else []
    done = {json.dumps(cell["settings"]) for cell in cells}
    last = time.monotonic()
    for settings in wanted(grids):
        if json.dumps(settings) not in done:
            cells.append(cell(settings))
            if time.monotonic() - last > 20:
                write(path, cells)
                last = time.monotonic()
    print(json.dumps(write(path, cells), indent=1))


def wanted(grids: Sequence[str] = PLAIN) -> list[dict[str, Any]]:
    """The settings of all cells of some grids."""
    found = []
    for name in grids:
        grid = GRIDS[name]
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            if settings["method"] == "fedavg" and settings["trained"] != "all":
                continue
            rng = generator("memory", *values)
            settings["levers"] = LEVERS[rng.integers(len(LEVERS))]
            settings["optimizer"] = OPTIMIZERS[rng.integers(len(OPTIMIZERS))]
            settings["grid"] = name
            found.append(settings)
    return sorted(found, key=lambda each: each["tokens"] * each["batch"] * each["vocabulary"])  # the long ones last


def write(path: Path, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Write cells and their summary; returns the summary."""
    summary = {}
    for grid in dict.fromkeys(cell["settings"]["grid"] for cell in cells):
        found = [cell for cell in cells if cell["settings"]["grid"] == grid]
        errors = [cell["predicted_bytes"] / cell["measured_bytes"] - 1 for cell in found]
        summary[grid] = {
            "cells": len(found),
            "largest_over": max([0.0, *errors]),
            "largest_under": max([0.0, *(-error for error in errors)]),
            "within_a_kilobyte": sum(abs(cell["predicted_bytes"] - cell["measured_bytes"]) < 1024 for cell in found),
        }
    files.write_json(path, {"summary": summary, "environment": environment(), "cells": cells})
    return summary


def network(settings: dict[str, Any]) -> Spec:
    """The plain network of a cell: GPT-2, or one of FAMILIES, whose images have as many patches as others tokens."""
    depth, embed, tokens = (settings[key] for key in ("depth", "embed", "tokens"))
    heads, fields = max(1, embed // 16), FAMILIES.get(settings.get("family", ""), {})
    plain = Spec(depth, embed, heads, embed // heads, 4 * embed, settings["vocabulary"], tokens)
    spec = replace(plain, **fields)
    side = math.isqrt(tokens) * spec.patch
    return replace(spec, positions=tokens + spec.leads + spec.first_position, image=side)


def plan_of(settings: dict[str, Any]) -> tuple[Spec, Plan, Local]:
    """The network, the plan with its levers, and the local settings of a cell."""
    s = settings
    chosen = METHODS[s["method"]](**({"depth": "budget"} if s["method"] == "lora" else {}))
    spec = chosen.adapt(network(s))
    layout = model.layout(spec)
    blocks = {"one": 1, "half": s["depth"] // 2, "all": s["depth"]}[s["trained"]]
    plan = next(p for p in chosen.plans(spec, Turn(0, 0, 1), {}) if p.trained_blocks(layout) == blocks)
    plan = replace(plan, levers=Levers(**s["levers"]))
    momentum = 0.9 if s["optimizer"] == "momentum" else 0.0
    kind = s["optimizer"] if not momentum else "sgd"
    local = Local(lr=1e-3, optimizer=kind, momentum=momentum, batch_size=s["batch"], steps=2)
    return spec, plan, local


def cell(settings: dict[str, Any]) -> dict[str, Any]:
    """One cell: its settings, the two peaks, and the largest difference in any category."""
    spec, plan, local = plan_of(settings)
    tokens = settings["tokens"]
    predicted = cost(spec, plan, local, tokens, 2)
    measured, moment = watch(spec, plan, local, tokens).peak()
    parts = asdict(predicted.memory)
    return {
        "settings": settings,
        "predicted_bytes": predicted.memory_bytes,
        "measured_bytes": sum(measured.values()),
        "predicted_moment": predicted.moment,
        "measured_moment": moment,
        "largest_difference_bytes": max(abs(parts[name] - measured.get(name, 0)) for name in parts),
    }


if __name__ == "__main__":
    main()
