"""The process behind `lamina.device.Devices`: `python -m lamina.worker`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lamina import client, model, wire
from lamina.data.task import Pairs
from lamina.flash import Flash
from lamina.job import Job, Local, Turn
from lamina.levers import Levers
from lamina.limits import lacks_memory, limited, resident_peak, start_count, traceless
from lamina.plan import GRADIENTS, Plan
from lamina.spec import Lora, Spec
from lamina.units import human
from lamina.watch import count_allocations, watch_job

_LARGE = ((4096, 1024, 1024), (512, 256, 4096), (4096, 256, 8192))
"""Linear layers, tokens x inputs x outputs, for which MKL's buffers are about as large as they get."""


def _serve() -> None:
    """A child for each folder named on standard input; its exit code on standard output."""
    torch.set_num_threads(1)
    _settle()
    for line in sys.stdin:
        print(_in_child(Path(line.strip())), flush=True)


def _in_child(folder: Path) -> int:
    """Answer in a fork; elsewhere than on Linux, where torch may have threads that do not survive one, right here."""
    child = os.fork() if sys.platform == "linux" else 0
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        _answer(folder)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        if sys.platform == "linux":
            os._exit(code)
    return code


def _answer(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    job, spec = wire.job_from_json(request, *(Flash(folder / f"{kind}.safetensors") for kind in ("arrays", "state")))
    examples = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("inputs", "targets"))
    shard, limit_bytes = Pairs(*examples), request["limit_bytes"]
    answer: dict[str, Any] = {"reason": None, "watched": None, "allocator_bytes": 0}
    _settle(job.local.batch_size * spec.length(shard.inputs.shape[1]), spec)
    before = start_count()
    update = None
    try:
        with limited(limit_bytes):
            if request["look"] == "tensors":
                update, timeline = watch_job(job, shard, spec)
                answer["watched"] = timeline.peak()
            elif request["look"] == "allocator":
                update, answer["allocator_bytes"] = count_allocations(lambda: client.train(job, shard, spec))
            else:
                update = client.train(job, shard, spec)
    except (MemoryError, RuntimeError) as error:
        if limit_bytes is None or not lacks_memory(error):
            raise
        answer["reason"] = f"exceeded its memory budget of {human('memory_bytes', limit_bytes)}"
    answer["rss_bytes"] = resident_peak() - before
    if update:
        for kind, tensors in (("update", update.arrays), ("state", update.state)):
            save_file({name: array.contiguous() for name, array in tensors.items()}, folder / f"{kind}.safetensors")
        answer["update"] = {"examples": update.examples, "steps": update.steps, "loss": update.loss}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _settle(tokens: int = 0, spec: Spec | None = None) -> None:
    """Use once what takes memory at its first use and keeps it, since a fork does not have these pages of its parent.

    MKL's buffers, for the layers of a job or for large ones; kernels, optimizers and files, by a job for every lever.
    """
    sizes = _LARGE
    if spec:
        most, outputs = min(tokens, _LARGE[0][1]), min(spec.outputs, _LARGE[-1][2])
        sizes = ((most, spec.embed, spec.ffn), (most, spec.ffn, spec.embed), (most, spec.embed, outputs))
    with traceless():
        for rows, inputs, outputs in sizes:
            x, weight = torch.zeros(rows, inputs, requires_grad=True), torch.zeros(outputs, inputs, requires_grad=True)
            F.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
            del x, weight
        _small_jobs()


def _small_jobs() -> None:
    spec = Spec(2, embed=64, heads=2, head_dim=32, ffn=256, vocab=96, positions=32, lora=Lora(2, 4.0, ("ffn.up",)))
    layout = model.layout(spec)
    names = frozenset(layout.params)
    params = model.init(spec, torch.Generator())
    local = Local(batch_size=4, steps=2, clip=1.0)
    exact = Levers(chunked_loss=True, fused_update=True, prefix_cache="disk", micro_batch=2, recompute=True)
    packed = Levers(prefix_cache="ram", cache_bits=16, frozen_bits=8, chunked_loss=True)
    with tempfile.TemporaryDirectory() as folder:
        path, examples = Path(folder) / "arrays.safetensors", Path(folder) / "ids.npy"
        save_file(params, path)
        np.save(examples, np.zeros((8, 32), dtype=np.int64))
        ids = np.load(examples, mmap_mode="r", allow_pickle=False)
        for trains in (names, names & layout.tail(1)):
            for levers in (Levers(), exact, packed, Levers(optimizer="adamw8"), Levers(optimizer="adafactor")):
                job = Job(Turn(0, 0, 1), Plan(names, trains, levers=levers), local, Flash(path))
                client.train(job, Pairs(ids, ids), spec)
        for gradient in GRADIENTS[1:]:
            client.train(replace(job, plan=replace(job.plan, gradient=gradient)), Pairs(ids, ids), spec)


if __name__ == "__main__":
    _serve()
