"""What levers do to the result: the demo, six rounds, every device with the same levers whether it needs them or not.

    python benchmarks/inexact.py benchmarks/inexact.json

Accuracy on held-out examples before and after, as in summary.json. The learning rate is the demo's throughout. The same
command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lamina import config, files, server
from lamina.levers import Levers
from lamina.machine import environment
from lamina.planner import Choice, choose_plan
from lamina.run import start

EXACT = Levers(chunked_loss=True, fused_update=True, prefix_cache="disk", recompute=True)
ROWS = {
    "none": Levers(),
    "all exact": EXACT,
    "frozen16": Levers(frozen_bits=16),
    "cache16": Levers(prefix_cache="ram", cache_bits=16),
    "frozen8": Levers(frozen_bits=8),
    "adamw8": Levers(optimizer="adamw8"),
    "adafactor": Levers(optimizer="adafactor"),
    "all": replace(EXACT, frozen_bits=8, cache_bits=16, optimizer="adamw8"),
}


def main() -> None:
    """Run all rows and write them."""
    parser = argparse.ArgumentParser(description="What levers do to the result.")
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for text, levers in ROWS.items():
        if text not in rows:
            rows[text] = accuracy(text, levers)
            files.write_json(path, {"environment": environment(), "rows": rows})


def accuracy(text: str, levers: Levers) -> dict[str, Any]:
    """Accuracy before and after a run in which every plan has these levers."""

    def forced(*args: Any) -> Choice:
        choice = choose_plan(*args)
        return replace(choice, plan=choice.plan and replace(choice.plan, levers=levers))

    demo = Path(__file__).parent.parent / "examples" / "demo.toml"
    with tempfile.TemporaryDirectory() as folder, patch.object(server, "choose_plan", forced):
        run = start(config.load_experiment(demo, ["rounds=6", "eval_every=0"]), Path(folder))
        losses: list[float | None] = []
        summary = run.play(lambda row, devices: losses.append(row.loss))
    found = {"accuracy": summary["accuracy"], "losses": losses}
    print(text, found, flush=True)
    return found


if __name__ == "__main__":
    main()
