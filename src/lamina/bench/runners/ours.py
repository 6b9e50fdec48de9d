"""lamina: a run as `lamina run` starts it, with its engine, its checks and its state on disk after every round."""

from __future__ import annotations

from pathlib import Path

import torch

from lamina import checkpoint, config
from lamina import run as runs

from .request import EXPERIMENT, Request
from .rounds import Rounds


def play(request: Request, rounds: Rounds) -> None:
    """All rounds; evaluations before the first and after the last are of a single sequence.

    Raises:
        RuntimeError: An update was not used.
    """
    run = runs.start(config.load_experiment(request.folder / EXPERIMENT), rounds.out / "runs")

    def save(folder: Path) -> None:
        checkpoint.write(folder, *run.deployed(), torch.float32, {})

    def on_round(row: runs.RoundRow, devices: object) -> None:
        rounds.end(save)
        if row.updates != request.cohort:
            raise RuntimeError(f"{row.updates} of {request.cohort} updates were used: {row.rejected}")
        rounds.begin()

    rounds.begin()
    run.play(on_round)
