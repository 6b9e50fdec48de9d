"""Whether runs on a CUDA card come out as on the processor, and how long workload C of `lamina bench` takes there.

python benchmarks/on_card.py [--device cuda:1] [--record benchmarks/on_card.json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lamina import checkpoint, cli, config, model
from lamina import run as runs
from lamina.bench.contest import difference
from lamina.bench.workloads import WORKLOADS
from lamina.errors import UserError
from lamina.layout import Params
from lamina.placement import card, place

METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "caff": {},
    "heterofl": {"own_labels": True},
    "depthfl": {"alpha": 0.1},
    "lora": {},
    "spry": {},
    "mezo": {},
}
ROWS = [(name, "auto", "float32") for name in METHODS] + [(name, "serial", "float32") for name in METHODS]
ROWS += [("fedavg", "auto", "bfloat16"), ("caff", "auto", "bfloat16")]
TOLERANCES = {"mezo": 1e-2, "bfloat16": 0.1}
"""Largest difference of weights, beside how far they went, where it is not 1e-3: slopes of two losses are rough."""


def weights(
    network: Path, folder: Path, device: str, method: str, engine: str, precision: str
) -> tuple[Params, Params]:
    """Before and after three rounds."""
    table = WORKLOADS["C"].table("cuda", 3, 1, network, device) | {
        "cohort": 8,
        "engine": engine,
        "precision": precision,
        "method": {"name": method} | METHODS[method],
        "fleet": [{"name": "all"}],
        "local": {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "steps": 3},
    }
    run = runs.start(config.experiment(table, method), folder)
    before = dict(run.state.params)
    run.play()
    return before, run.state.params


def main() -> int:
    """Compare, then time; returns the exit code: 2 without a card, 1 where weights differ by too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    try:
        device = place(given.device)
    except UserError as error:
        print(f"error: {error}; there is nothing to check here", file=sys.stderr)
        return 2
    print(f"{device}, {card(device) or 'the processor itself'}, against the processor:")
    apart = 0
    with TemporaryDirectory() as folder:
        network = Path(folder) / "network"
        spec = WORKLOADS["C"].spec
        checkpoint.write(network, spec, model.init(spec, torch.Generator().manual_seed(0)), torch.float32, {})
        for row in ROWS:
            (before, host), (_, there) = (weights(network, Path(folder), each, *row) for each in ("cpu", str(device)))
            found = difference(before, host, there)
            wrong = not found <= max(TOLERANCES.get(each, 1e-3) for each in row)
            apart += wrong
            print(f"{' '.join(row):28} weights differ by {found:.1e}{', too much' * wrong}")
    if apart:
        return 1
    sys.argv = ["lamina", "bench", "C", "--device", str(device), "--against", "loop,loop-lean"]
    sys.argv += ["--record", str(given.record)] if given.record else []
    cli.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
