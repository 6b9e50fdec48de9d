"""What it is worth that simulation keeps the memory of a step for the next: time and page faults, with and without.

python benchmarks/keep_freed.py benchmarks/keep_freed.json

Devices of workloads A and C of `lamina bench` play rounds in processes of their own, one thread each, in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch

from lamina import files, model
from lamina.bench.workloads import VOCAB, WINDOW, WORKLOADS
from lamina.data.task import Pairs
from lamina.engines.prefix import Prefixes
from lamina.engines.stacked import StackedEngine
from lamina.job import Job, Local, Turn
from lamina.limits import keep_freed
from lamina.machine import environment
from lamina.methods.blocks import Caff
from lamina.plan import Plan

DEVICES = {"A": 4, "C": 48}
ROUNDS, TURNS = 4, 3


def played(name: str) -> list[dict[str, float]]:
    """Milliseconds and page faults per device of each round but the first, in which prefixes run."""
    workload, count = WORKLOADS[name], DEVICES[name]
    spec = workload.spec
    params = model.init(spec, torch.Generator().manual_seed(0))
    layout = model.layout(spec)
    plan = Plan(frozenset(layout.params), layout.tail(workload.trained[0]))
    local = Local(**workload.local)
    rng, shards = np.random.default_rng(0), []
    for _ in range(count):
        ids = rng.integers(VOCAB, size=(workload.examples, WINDOW + 1))
        shards.append(Pairs(ids[:, :-1], ids[:, 1:]))
    engine = StackedEngine(spec, shards, 1, Prefixes(2**32, 0))
    rows = []
    for round_ in range(ROUNDS):
        jobs = [Job(Turn(0, round_, ROUNDS, device), plan, local, params, Caff()) for device in range(count)]
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in engine.run(jobs):
            pass
        after = resource.getrusage(resource.RUSAGE_SELF)
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        faults = (after.ru_minflt - before.ru_minflt) / count
        rows.append({"user_ms": 1e3 * user / count, "system_ms": 1e3 * system / count, "page_faults": faults})
    return rows[1:]


def main() -> None:
    """Both ways, in turn; medians over rounds and turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="JSON that is written; or, with --child, the workload")
    parser.add_argument("--child", choices=("kept", "default"), help="used by the script itself")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        if given.child == "kept":
            keep_freed()
        print(json.dumps(played(str(given.path))))
        return
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {"kept": [], "default": []} for name in DEVICES}
    for _ in range(TURNS):
        for name, ways in found.items():
            for way, rows in ways.items():
                command = [sys.executable, __file__, name, "--child", way]
                rows += json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    medians = {
        name: {way: {key: round(median(row[key] for row in rows), 2) for key in rows[0]} for way, rows in ways.items()}
        for name, ways in found.items()
    }
    files.write_json(given.path, {"per device and round": medians, "environment": environment()})
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
