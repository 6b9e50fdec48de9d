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
import weakref
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
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lamina import files
from lamina.run import environment

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
    with _Watch() as watch:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            watch.see(tensor)
        list(itertools.islice(training(model), STEPS))
    return {"peak_bytes": watch.peak}


def allocated(*values: Any) -> dict[str, int]:
    """The peak as torch's allocator has it, on top of the weights."""
    model = network(*values)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        list(itertools.islice(training(model), STEPS))
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    memories = (tensor.untyped_storage() for tensor in itertools.chain(model.parameters(), model.buffers()))
    weights = sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())
    return {"allocator_peak_bytes": weights + max(itertools.accumulate(int(event.nbytes()) for event in events))}


def unwatched(vocabulary: int, activation: str, case: str) -> dict[str, float]:
    """Growth of resident memory since before the network was made, and seconds of a step after the first."""
    next(training(network(16, activation, case, n_layer=1, n_embd=8)))  # imports what is imported at first use
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    steps = training(network(vocabulary, activation, case))
    seconds = [next(steps) for _ in range(STEPS)]
    rss = resident_peak() - before
    seconds += itertools.islice(steps, 4 - STEPS)
    return {"rss_bytes": rss, "seconds_per_step": round(median(seconds[1:]), 3)}


def resident_peak() -> int:
    """Largest resident memory since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


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


class _Watch(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def see(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        memory = tensor.untyped_storage()
        if memory._cdata not in self.known:
            self.known.add(memory._cdata)
            self.live += memory.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(memory, self._gone, memory._cdata, memory.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the kernel, then look at what it made."""
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, torch.Tensor):
                self.see(each)
        return out


if __name__ == "__main__":
    main()
