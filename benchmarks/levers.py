"""What the levers save and what they cost in time, on the shape of `benchmarks/peers_memory.py`.

    python benchmarks/levers.py memory benchmarks/levers_memory.json
    python benchmarks/levers.py time benchmarks/levers_time.json

Memory: predicted, and measured in a process of its own, of two AdamW steps of 12 blocks, d = 256, 8 heads, batch 8, 128
tokens, beside what `transformers` and `peft` take there (benchmarks/peers_memory.json); the same command goes on after
a stop. Time: a round of 2 steps with each lever, in turns with the same round without, in one process; the median of
the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lamina import client, files, model
from lamina.cost import cost
from lamina.job import Local, Turn
from lamina.levers import Levers
from lamina.machine import environment
from lamina.measure import measure, work
from lamina.methods import METHODS
from lamina.plan import Plan
from lamina.spec import Spec

BLOCKS, EMBED, HEADS, TOKENS, BATCH = 12, 256, 8, 128, 8
EXACT = {"chunked_loss": True, "fused_update": True, "prefix_cache": "disk", "recompute": True}
NO_HEAD = {"train_head": False, "train_embeddings": False}
MEMORY: tuple[tuple[str, str, dict[str, Any], int, dict[str, Any]], ...] = (
    ("full finetuning, plain", "fedavg", {}, 12, {}),
    ("LoRA r=8 on all linears, plain", "lora", {"train_head": False}, 12, {}),
    ("last block, plain", "caff", NO_HEAD, 1, {}),
    ("last block, exact levers", "caff", NO_HEAD, 1, EXACT),
    ("all 12 blocks, exact levers", "caff", NO_HEAD, 12, EXACT),
    ("all 12 blocks and head, exact levers", "caff", {"train_embeddings": False}, 12, EXACT),
    ("all 12 blocks, exact levers, states in 8 bits", "caff", NO_HEAD, 12, EXACT | {"optimizer": "adamw8"}),
    ("all 12 blocks, exact levers, Adafactor", "caff", NO_HEAD, 12, EXACT | {"optimizer": "adafactor"}),
    ("LoRA r=8 on all linears, exact levers", "lora", {"train_head": False}, 12, EXACT),
    ("LoRA r=8, exact levers, frozen in 8 bits", "lora", {"train_head": False}, 12, EXACT | {"frozen_bits": 8}),
)
TIME: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("chunked_loss", 12, {"chunked_loss": True}),
    ("fused_update", 12, {"fused_update": True}),
    ("cache_ram", 3, {"prefix_cache": "ram"}),
    ("cache_disk", 3, {"prefix_cache": "disk"}),
    ("micro_batch 4", 12, {"micro_batch": 4}),
    ("micro_batch 1", 12, {"micro_batch": 1}),
    ("recompute", 12, {"recompute": True}),
    ("all exact", 12, EXACT),
    ("all exact, clipped", 12, EXACT),
    ("frozen16", 3, {"frozen_bits": 16}),
    ("frozen8", 3, {"frozen_bits": 8}),
    ("adamw8", 12, {"optimizer": "adamw8"}),
    ("adafactor", 12, {"optimizer": "adafactor"}),
)
STEPS, TURNS = 2, 5


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="What the levers save and cost.")
    parser.add_argument("part", choices=("memory", "time"))
    parser.add_argument("path", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "time":
        rows = [time_row(*row, 8192) for row in TIME]
        files.write_json(given.path, {"environment": environment(), "rows": rows})
        return
    rows = json.loads(given.path.read_text())["rows"] if given.path.exists() else []
    done = {(row["case"], row["vocabulary"]) for row in rows}
    for vocabulary, row in itertools.product((8192, 50257), MEMORY):
        if (row[0], vocabulary) not in done:
            rows.append(memory_row(*row, vocabulary))
            files.write_json(given.path, {"environment": environment(), "rows": rows})
    files.write_json(given.path, {"environment": environment(), "targets": against_peers(rows), "rows": rows})


def plan_of(name: str, settings: dict[str, Any], blocks: int, levers: dict[str, Any], vocabulary: int) -> Any:
    """The network and the plan of a row."""
    method = METHODS[name](**settings)
    spec = method.adapt(Spec(BLOCKS, EMBED, HEADS, EMBED // HEADS, 4 * EMBED, vocabulary, TOKENS))
    layout = model.layout(spec)
    plans = method.plans(spec, Turn(0, 0, 1), {})
    plan = next(plan for plan in plans if plan.trained_blocks(layout) == blocks)
    return spec, replace(plan, levers=Levers(**levers))


def memory_row(
    text: str, name: str, settings: dict[str, Any], blocks: int, levers: dict[str, Any], vocabulary: int
) -> dict[str, Any]:
    """Predicted and measured peak of one plan."""
    spec, plan = plan_of(name, settings, blocks, levers, vocabulary)
    local = Local(batch_size=BATCH, steps=2)
    found = measure(spec, plan, local, TOKENS)
    row = {
        "case": text,
        "vocabulary": vocabulary,
        "predicted_bytes": cost(spec, plan, local, TOKENS, 2).memory_bytes,
        "measured_bytes": found.memory.total,
        "allocator_bytes": found.allocator_bytes,
        "rss_bytes": found.rss_bytes,
    }
    print(row, flush=True)
    return row


def time_row(text: str, blocks: int, levers: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Time of a round with levers over that without, and the same ratio of operations."""
    spec, plan = plan_of("caff", NO_HEAD, blocks, levers, vocabulary)
    local = Local(batch_size=BATCH, steps=STEPS, clip=1.0 if "clipped" in text else 0.0)
    plain = replace(plan, levers=Levers())
    seconds(spec, plain, local), seconds(spec, plan, local)
    ratios = [seconds(spec, plan, local) / seconds(spec, plain, local) for _ in range(TURNS)]
    flops = [cost(spec, each, local, TOKENS, STEPS).flops for each in (plan, plain)]
    row = {
        "lever": text,
        "trained_blocks": blocks,
        "seconds_ratio": median(ratios),
        "ratios": sorted(ratios),
        "flops_ratio": flops[0] / flops[1],
    }
    print(row, flush=True)
    return row


def seconds(spec: Spec, plan: Plan, local: Local) -> float:
    """Wall time of one round."""
    job, shard = work(spec, plan, local, TOKENS)
    begin = time.perf_counter()
    client.train(job, shard, spec)
    return time.perf_counter() - begin


def against_peers(memory: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All 12 blocks with exact levers against what people run today, and against our own plain LoRA."""
    peers = json.loads((Path(__file__).parent / "peers_memory.json").read_text())["cells"]
    found = []
    for vocabulary in (8192, 50257):
        ours = {row["case"]: row["measured_bytes"] for row in memory if row["vocabulary"] == vocabulary}
        theirs = {
            f"{cell['case']}, {cell['activation']}": cell["peak_bytes"]
            for cell in peers
            if cell["vocabulary"] == vocabulary
        }
        best = ours["all 12 blocks, exact levers"]
        ratios = {f"peers: {case}": best / peak for case, peak in theirs.items()}
        ratios["ours: LoRA, plain"] = best / ours["LoRA r=8 on all linears, plain"]
        found.append({"vocabulary": vocabulary, "measured_bytes": best, "over": ratios})
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    main()
