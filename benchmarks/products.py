"""Speed of fp32 and bf16 products of a linear layer, by torch's own library and by oneDNN, on one thread.

python benchmarks/products.py benchmarks/products.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lamina import files, products
from lamina.bench.contest import machine

SHAPES = ((640, 64, 256), (640, 256, 64), (1280, 256, 256), (1280, 256, 1024), (1280, 1024, 256))
"""Rows, inputs, outputs."""


def seconds(call: Callable[[], object], repeats: int = 50) -> float:
    """The least time of a call."""
    call()
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


def measured(rows: int, inputs: int, outputs: int) -> dict[str, Any]:
    """GFLOP/s of each library for y = x W^T, and for the gradients of x and W."""
    x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: F.linear(x, weight),
        "torch, gradient of x": lambda: gradient @ weight,
        "torch, gradient of W": lambda: gradient.T @ x,
        "lamina": lambda: products.linear(x, weight),
        "lamina, gradient of x": lambda: products.linear(gradient, weight.T),
        "lamina, gradient of W": lambda: products.outer(gradient, x),
        "lamina, bf16": lambda: products.linear(x16, weight16),
    }
    flops = 2 * rows * inputs * outputs
    return {"shape": [rows, inputs, outputs]} | {
        name: round(flops / seconds(call) / 1e9, 1) for name, call in calls.items()
    }


def main() -> None:
    """Measure all shapes and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    torch.set_num_threads(1)
    rows = [measured(*shape) for shape in SHAPES]
    files.write_json(path, {"onednn": products.prefers_onednn(), "gflops": rows, "machine": machine()})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
