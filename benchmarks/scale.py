"""Any number of devices: how soon a run starts, and the memory of the process, round after round.

    python benchmarks/scale.py benchmarks/scale.json
    python benchmarks/scale.py benchmarks/scale_auto.json --devices 100000    # workload F

Task "noise", a network of 4 blocks of width 64 of which every device trains the last 2, AdamW, 1,000 devices a round,
in a process of its own for each number of devices; a sample of 1,000 is evaluated before the first and after the last
round. `server_seconds` is the CPU time of a round in which devices answer at once, with what they were sent.

Slopes are those of straight lines through the resident memory after each round, by least squares. The last round is
among them, and with it the second evaluation.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import checkpoint, config, files, model
from lamina.cost import cost
from lamina.job import Job, Local, Turn, Update
from lamina.machine import environment
from lamina.methods.blocks import Caff
from lamina.run import start
from lamina.server import play_round
from lamina.spec import Spec

SPEC = Spec(blocks=4, embed=64, heads=4, head_dim=16, ffn=256, vocab=96, positions=80)
TRAINED, WINDOW, COHORT = 2, 80, 1000
ROUNDS = {100_000: 50, 10_000: 20, 1_000: 20}
"""Number of devices -> rounds."""
MIB = 2**20


class Echo:
    """Devices that send what they were sent, at once."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Update]:
        """An update for each job."""
        for job in jobs:
            arrays = {name: job.arrays[name].clone() for name in job.plan.trains}
            yield Update(job.turn, arrays, 64, max(1, job.local.steps), 1.0)


def main() -> None:
    """Each number of devices in turn; what was found is written after each."""
    parser = argparse.ArgumentParser(description="Any number of devices.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--steps", type=int, default=4, help="local steps of a device")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--devices", type=int, nargs="+", default=list(ROUNDS), help="numbers of devices, in turn")
    parser.add_argument("--cell", action="store_true", help="used by the script itself: one number, in this process")
    given = parser.parse_args()
    local = Local(steps=given.steps, batch_size=given.batch_size)
    if given.cell:
        (devices,) = given.devices
        files.write_json(given.path, cell(devices, local, given.engine, ROUNDS.get(devices, 10)))
        return
    settings: dict[str, Any] = {"cohort": COHORT, "window": WINDOW}
    settings |= {key: getattr(given, key) for key in ("engine", "steps", "batch_size")}
    found = []
    for devices in given.devices:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "cell.json"
            more = ["--steps", str(given.steps), "--batch-size", str(given.batch_size), "--engine", given.engine]
            subprocess.run(
                [sys.executable, __file__, str(part), "--devices", str(devices), "--cell", *more], check=True
            )
            found.append(json.loads(part.read_text(encoding="utf-8")))
        print(found[-1], flush=True)
        files.write_json(given.path, {"environment": environment(), "settings": settings, "cells": found})


def cell(devices: int, local: Local, engine: str, rounds: int) -> dict[str, Any]:
    """What one number of devices takes."""
    with tempfile.TemporaryDirectory() as folder:
        table = experiment(Path(folder), devices, local, rounds) | {"engine": engine}
        before, tick = rss(), time.perf_counter()
        run = start(config.experiment(table, "benchmark"), Path(folder) / "runs")
        started = time.perf_counter() - tick
        examples = [len(shard) for shard in run.task.train]
        tick = time.process_time()
        state = run.state
        for _ in range(3):
            state, _ = play_round(run.experiment, run.outlook, examples, Echo(), state)
        server = (time.process_time() - tick) / 3
        del state
        sizes, seconds = [], []

        def note(row: Any, devices: Any) -> None:
            sizes.append(rss())
            seconds.append(row.seconds)

        run.play(on_round=note)
        return {
            "devices": devices,
            "rounds": rounds,
            "start_seconds": round(started, 3),
            "server_seconds": round(server, 3),
            "round_seconds": float(np.median(seconds)),
            "rss_mib": {"imports": before, **{f"round {n}": sizes[n - 1] for n in (1, *range(10, rounds + 1, 10))}},
            "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "slope_mib_per_10_rounds": slope(sizes),
            "slope_mib_per_10_rounds_after_10": slope(sizes[10:]),
            "state_mib": round((run.folder / "state.safetensors").stat().st_size / MIB, 2),
        }


def experiment(folder: Path, devices: int, local: Local, rounds: int) -> dict[str, Any]:
    """Tables of the experiment, and its network in the folder."""
    params = model.init(SPEC, torch.Generator().manual_seed(0))
    checkpoint.write(folder / "network", SPEC, params, torch.float32, {})
    layout = model.layout(SPEC)
    plan = next(p for p in Caff().plans(SPEC, Turn(0, 0, 1), {}) if p.trained_blocks(layout) == TRAINED)
    memory = cost(SPEC, plan, local, WINDOW, local.steps, Caff()).memory_bytes
    return {
        "name": "scale",
        "rounds": rounds,
        "cohort": COHORT,
        "workers": 1,
        "eval_devices": COHORT,
        "networks": [str(folder / "network")],
        "task": {"name": "noise", "devices": devices, "window": WINDOW},
        "method": {"name": "caff"},
        "local": {"steps": local.steps, "batch_size": local.batch_size},
        "fleet": [{"name": "all", "memory": memory}],
    }


def rss() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return round(pages * resource.getpagesize() / MIB, 2)


def slope(sizes: list[float]) -> float:
    """Growth over ten rounds."""
    return round(10 * float(np.polyfit(range(len(sizes)), sizes, 1)[0]), 3) if len(sizes) > 1 else 0.0


if __name__ == "__main__":
    main()
