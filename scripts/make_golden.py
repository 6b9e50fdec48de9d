"""Ten rounds of every method on the demo's task at full budget; writes their losses, which a test compares.

Methods that are for classification alone tell which of two roles speaks.

python scripts/make_golden.py tests/golden/losses.json [METHOD ...]

With names, only those lines are made anew. A changed line is a changed result: say why in the commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lamina import config, model
from lamina.data.task import Task
from lamina.data.text import decode
from lamina.engines.local import LocalEngine
from lamina.experiment import load_task, look_ahead
from lamina.methods import METHODS
from lamina.origin import first_state
from lamina.run import Run
from lamina.server import play_round

ROUNDS, ROWS = 10, 2
SPEAKERS = 2


def experiment(name: str, task: Task | None = None, spoken: Path | None = None) -> Run:
    """The demo's task, a few roles, the smallest network, one class without limits, the method as it is by default.

    With `spoken`, the task is that of its texts.
    """
    table: dict[str, Any] = {
        "name": "golden",
        "rounds": ROUNDS,
        "cohort": 3,
        "networks": ["novels-3"],
        "task": {"name": "shakespeare", "devices": 12, "test_windows": ROWS},
        "method": {"name": name},
        "local": {"lr": 2e-3, "steps": 4, "batch_size": 8},
        "fleet": [{"name": "all"}],
    }
    if spoken:
        table["task"] = {"name": "text-classification", "path": str(spoken), "devices": 12}
    made = config.experiment(table, "golden")
    task = task if task and not spoken else load_task(made)
    outlook = look_ahead(made, task)
    return Run(Path(), made, outlook, task, first_state(made, outlook, task))


def losses(name: str, task: Task | None = None) -> dict[str, float]:
    """Training loss of the first and the last round, and on held-out text before and after, nats per prediction."""
    torch.set_num_threads(1)
    if "language" in METHODS[name].tasks:
        return played(experiment(name, task))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.csv"
        write_spoken(path, task or experiment("fedavg").task)
        return played(experiment(name, spoken=path))


def write_spoken(path: Path, task: Task) -> None:
    """Windows of the first roles, each with its role."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for role, shard in zip(task.names[:SPEAKERS], task.train, strict=False):
            ids, _ = shard.batch(np.arange(len(shard)))
            rows.writerows([decode(each), role] for each in ids)


def played(run: Run) -> dict[str, float]:
    """The rounds."""
    engine = LocalEngine(run.outlook.chosen.spec, run.task.train, 1)
    examples = [len(shard) for shard in run.task.train]
    found = {"held_out_before": held_out(run)}
    for round_ in range(ROUNDS):
        run.state, rows = play_round(run.experiment, run.outlook, examples, engine, run.state)
        if round_ in (0, ROUNDS - 1):
            found["first" if round_ == 0 else "last"] = float(np.mean([row.loss for row in rows]))
    return found | {"held_out_after": held_out(run)}


@torch.no_grad()
def held_out(run: Run) -> float:
    """Of the network that the method hands out, over the last half of each test window."""
    spec, params = run.deployed()
    total = []
    for shard in run.task.test:
        ids, given = shard.batch(np.arange(min(ROWS, len(shard))))
        last, targets = ids.shape[1] // 2, torch.from_numpy(given)
        logits = model.forward(spec, params, model.batch(spec, ids), last=last)
        total.append(F.cross_entropy(logits.flatten(0, 1), targets[:, -last:].flatten()).item())
    return float(np.mean(total))


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write the golden losses.")
    parser.add_argument("path", type=Path)
    parser.add_argument("names", nargs="*", default=list(METHODS))
    given = parser.parse_args()
    known = json.loads(given.path.read_text()) if given.path.exists() else {}
    task = experiment("fedavg").task
    for name in given.names:
        known[name] = {key: round(value, 5) for key, value in losses(name, task).items()}
        print(name, known[name], flush=True)
    lines = (f'  "{name}": {json.dumps(known[name])}' for name in METHODS if name in known)
    given.path.parent.mkdir(parents=True, exist_ok=True)
    given.path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
