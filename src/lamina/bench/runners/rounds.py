"""Times the rounds of a system, and tells of each as soon as it is over."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from .processes import cpu_seconds

CHECKED = 2
"""Rounds after which the weights of all systems are compared."""
WEIGHTS = "model.safetensors"


class Rounds:
    """A clock that runs from `begin` to `end`."""

    def __init__(self, protocol: TextIO, out: Path) -> None:
        """Tell `protocol`, and keep weights in `out`."""
        self.out = out
        self._protocol, self._done = protocol, 0
        self._cpu = self._wall = 0.0

    def begin(self) -> None:
        """A round begins."""
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def end(self, save: Callable[[Path], None]) -> None:
        """A round is over; `save` writes the global weights into a folder, as transformers names them."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # a card may still be at it
        wall, cpu = time.perf_counter() - self._wall, cpu_seconds() - self._cpu
        self._done += 1
        if self._done == CHECKED:
            save(self.out)
        line = {"round": self._done, "cpu_seconds": cpu, "wall_seconds": wall}
        print(json.dumps(line), file=self._protocol, flush=True)
