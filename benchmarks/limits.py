"""Budgets enforced: what is planned to fit finishes under its limit, and with 15 % less it fails.

    python benchmarks/limits.py benchmarks/limits.json

Cells of `benchmarks/memory.py` with a predicted peak of 8 MiB to 1 GiB, drawn at random, wider than there. Each runs
two steps in a process of its own (`lamina.device`): under a limit of exactly the predicted peak, under 0.85 of it, and
measured without a limit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memory import GRID, plan_of, wanted

from lamina import files
from lamina.cost import cost
from lamina.device import Devices
from lamina.job import Failure
from lamina.machine import environment
from lamina.measure import measure, work
from lamina.turn import generator

CELLS, LEAST, MOST = 20, 8 * 2**20, 2**30


def main() -> None:
    """Run all cells and write them."""
    parser = argparse.ArgumentParser(description="Budgets enforced.")
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    devices, cells = Devices(), []
    for settings in drawn():
        cells.append(cell(devices, settings))
        print(cells[-1], flush=True)
    devices.close()
    summary = {
        "cells": len(cells),
        "finished_at_predicted": sum(each["at_predicted"] == "finished" for each in cells),
        "failed_at_085": sum(each["at_085"].startswith("exceeded its memory budget") for each in cells),
        "largest_rss_over_predicted": max(each["rss_bytes"] / each["predicted_bytes"] for each in cells),
        "largest_allocator_over_predicted": max(each["allocator_bytes"] / each["predicted_bytes"] for each in cells),
    }
    print(summary)
    files.write_json(path, {"summary": summary, "environment": environment(), "cells": cells})


def drawn() -> list[dict[str, Any]]:
    """The settings of the sample."""
    rng = generator("limits")
    every = [each for each in wanted() if each["embed"] in GRID["embed"]]
    found = []
    for index in rng.permutation(len(every)):
        settings = every[index] | {"embed": int(rng.choice((128, 192, 256)))}
        spec, plan, local = plan_of(settings)
        if LEAST <= cost(spec, plan, local, settings["tokens"], 2).memory_bytes <= MOST:
            found.append(settings)
        if len(found) == CELLS:
            return found
    raise AssertionError


def cell(devices: Devices, settings: dict[str, Any]) -> dict[str, Any]:
    """One cell: what came of both limits, and the measurement."""
    spec, plan, local = plan_of(settings)
    tokens = settings["tokens"]
    predicted = cost(spec, plan, local, tokens, 2).memory_bytes
    job, shard = work(spec, plan, local, tokens)
    answers = [devices.run(job, shard, spec, limit).answer for limit in (predicted, int(0.85 * predicted))]
    said = [answer.reason if isinstance(answer, Failure) else "finished" for answer in answers]
    found = measure(spec, plan, local, tokens)
    return {
        "settings": settings,
        "predicted_bytes": predicted,
        "measured_bytes": found.memory.total,
        "allocator_bytes": found.allocator_bytes,
        "rss_bytes": found.rss_bytes,
        "at_predicted": said[0],
        "at_085": said[1],
    }


if __name__ == "__main__":
    main()
