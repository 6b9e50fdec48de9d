"""Predicted against measured peak of live tensor bytes, over a grid of networks, plans and settings.

    python benchmarks/memory.py benchmarks/memory.json

Each cell runs two real steps on random weights and tokens in this process and watches every tensor that torch makes.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lamina import files, model
from lamina.cost import cost
from lamina.job import Local, Turn
from lamina.measure import watch
from lamina.methods import METHODS
from lamina.model import Spec
from lamina.run import environment

GRID: dict[str, tuple[Any, ...]] = {
    "depth": (3, 6, 12),
    "tokens": (64, 128),
    "batch": (1, 8),
    "vocabulary": (96, 8192),
    "method": ("caff", "lora"),
    "optimizer": ("sgd", "adamw"),
    "trained": ("one", "half", "all"),
}
EMBED, HEADS = 128, 4


def main() -> None:
    """Measure all cells and write them."""
    parser = argparse.ArgumentParser(description="Predicted against measured peaks.")
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    torch.set_num_threads(1)
    cells = [cell(**dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values())]
    errors = [each["predicted_bytes"] / each["measured_bytes"] - 1 for each in cells]
    summary = {
        "cells": len(cells),
        "embed": EMBED,
        "largest_over": max(0.0, *errors),
        "largest_under": max(0.0, *(-error for error in errors)),
        "exact": sum(error == 0 for error in errors),
    }
    print(summary)
    files.write_json(path, {"summary": summary, "environment": environment(), "cells": cells})


def cell(
    depth: int, tokens: int, batch: int, vocabulary: int, method: str, optimizer: Any, trained: str
) -> dict[str, Any]:
    """One cell: its settings, the two peaks, and the largest difference in any category."""
    settings = {"depth": "budget"} if method == "lora" else {}
    chosen = METHODS[method](**settings)
    plain = Spec(depth, EMBED, HEADS, EMBED // HEADS, 4 * EMBED, vocabulary, tokens)
    spec = chosen.adapt(plain)
    layout = model.layout(spec)
    wanted = {"one": 1, "half": depth // 2, "all": depth}[trained]
    plan = next(p for p in chosen.plans(layout, Turn(0, 0, 1)) if p.trained_blocks(layout) == wanted)
    local = Local(lr=1e-3, optimizer=optimizer, batch_size=batch, steps=2)
    predicted = cost(spec, plan, local, tokens, 2)
    measured, _ = watch(spec, plan, local, tokens).peak()
    parts = asdict(predicted.memory)
    return {
        "depth": depth,
        "tokens": tokens,
        "batch": batch,
        "vocabulary": vocabulary,
        "method": method,
        "optimizer": optimizer,
        "trained_blocks": wanted,
        "predicted_bytes": predicted.memory_bytes,
        "measured_bytes": sum(measured.values()),
        "peak_moment": predicted.moment,
        "largest_difference_bytes": max(abs(parts[name] - measured.get(name, 0)) for name in parts),
    }


if __name__ == "__main__":
    main()
