"""Peak of live tensor bytes of two AdamW steps as people run them with transformers and peft.

    python benchmarks/peers_memory.py benchmarks/peers_memory.json

Each number comes from a fresh process, and the peak from two independent sources: a watch on every tensor that torch
makes, and what torch's allocator says it gave out, also inside kernels. Whatever costs memory and can be done without
is off: dropout, the cache, attention as a plain formula, gradients kept as zeros, outputs that live on. GPT-2's own
activation is a formula of eight kernels; each cell also runs with "gelu_pytorch_tanh", the same function as one kernel,
which people have to ask for. Resident memory has the holes that malloc leaves, up to a tenth other each time.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from lamina import files
from lamina.limits import resident_peak, start_count
from lamina.machine import environment
from lamina.watch import Watch, count_allocations

GRID: dict[str, tuple[Any, ...]] = {
    "vocabulary": (8192, 50257),
    "activation": ("gelu_new", "gelu_pytorch_tanh"),
    "case": ("full", "lora", "last block"),
}
BATCH, TOKENS, STEPS = 8, 128, 2
SHAPE = {"n_layer": 12, "n_embd": 256, "n_head": 8, "n_positions": TOKENS}
OPTIONS = {"attn_implementation": "sdpa", "use_cache": False, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
ADAMW = {"lr": 1e-3, "fused": True}


def main() -> None:
    """Measure all cells and write them."""
    parser = argparse.ArgumentParser(description="Measured peaks of transformers and peft.")
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    cells = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for values in itertools.product(*GRID.values()):
            cell = dict(zip(GRID, values, strict=True))
            for measure in (watched, allocated, unwatched):
                cell |= fresh.submit(measure, *values).result()
            cells.append(cell)
            print(", ".join(f"{name} {value}" for name, value in cell.items()), flush=True)
    network = SHAPE | OPTIONS | {"dtype": "float32", "tie_word_embeddings": True}
    settings = {"network": network, "lora": LORA, "adamw": ADAMW, "batch": BATCH, "tokens": TOKENS, "steps": STEPS}
    versions = environment() | {name: version(name) for name in ("transformers", "peft")}
    files.write_json(path, {"environment": versions, "settings": settings | {"threads": 1}, "cells": cells})


def watched(*values: Any) -> dict[str, int]:
    """The peak as a dispatch mode and finalizers see it."""
    model = network(*values)
    with Watch() as watch:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            watch.see(tensor, "weights")
        list(itertools.islice(training(model), STEPS))
    return {"peak_bytes": sum(watch.timeline.peak()[0].values())}


def allocated(*values: Any) -> dict[str, int]:
    """The peak as torch's allocator has it, on top of the weights."""
    model = network(*values)
    _, peak = count_allocations(lambda: list(itertools.islice(training(model), STEPS)))
    memories = (tensor.untyped_storage() for tensor in itertools.chain(model.parameters(), model.buffers()))
    weights = sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())
    return {"allocator_peak_bytes": weights + peak}


def unwatched(vocabulary: int, activation: str, case: str) -> dict[str, float]:
    """Growth of resident memory since before the network was made, and seconds of a step after the first."""
    next(training(network(16, activation, case, n_layer=1, n_embd=8)))  # imports what is imported at first use
    before = start_count()
    steps = training(network(vocabulary, activation, case))
    seconds = [next(steps) for _ in range(STEPS)]
    rss = resident_peak() - before
    seconds += itertools.islice(steps, 4 - STEPS)
    return {"rss_bytes": rss, "seconds_per_step": round(median(seconds[1:]), 3)}


def network(vocabulary: int, activation: str, case: str, **smaller: int) -> Any:
    """A network on random weights, with what the case trains set to train."""
    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "activation_function": activation}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE | OPTIONS | names | smaller))
    assert model.lm_head.weight is model.transformer.wte.weight
    if case == "lora":
        model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    elif case == "last block":
        model.requires_grad_(False)
        model.transformer.h[-1].requires_grad_(True)
    return model.train()


def training(model: Any) -> Iterator[float]:
    """Train on random tokens, on and on; the seconds of each step."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], **ADAMW)
    while True:
        start = time.perf_counter()
        ids = torch.randint(model.config.vocab_size, (BATCH, TOKENS))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield time.perf_counter() - start


if __name__ == "__main__":
    main()
