"""Limits on the memory of this process, and what it takes.

The limit is RLIMIT_DATA: what a process may ask for as private memory, to the byte, whether or not it touches it. It
needs no rights, and asking for more fails with an exception, after which the process goes on; a cgroup kills. For the
limit to be a sharp measure, malloc must give memory back: everything from 64 KiB on is mapped by itself; and what grows
at its first use and stays, such as MKL's buffers, must have grown before (`settle`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lamina import client, model
from lamina.data.task import Pairs
from lamina.errors import UserError
from lamina.flash import Flash
from lamina.job import Job, Local, Turn
from lamina.levers import Levers
from lamina.model import Lora, Spec
from lamina.plan import Plan

_MAPPED_BYTES, _SMALL_BYTES = 64 * 1024, 1024


def slack_bytes(budget_bytes: int) -> int:
    """What a process may have on top of its budget: page rounding and kernel buffers, 768 KiB and two percent."""
    return 768 * 1024 + budget_bytes // 50


def demand_limits() -> None:
    """Refuse to go on where memory cannot be limited.

    Raises:
        UserError: The system is not Linux.
    """
    if sys.platform != "linux":
        raise UserError(f"enforce limits the memory of processes, which needs Linux; this is {sys.platform}")


@contextlib.contextmanager
def limited(limit_bytes: int | None) -> Iterator[None]:
    """No more memory than there is now, the limit and the slack."""
    if limit_bytes is None:
        yield
        return
    import resource

    most = _status("VmData") + limit_bytes + slack_bytes(limit_bytes)
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had."""
    text = str(error)  # torch's allocator begins with "[enforce fail"; the rest may be missing, for lack of memory
    return isinstance(error, MemoryError) or text.startswith("[enforce fail") or "bad_alloc" in text


def _tune_malloc(mapped_bytes: int) -> None:
    """Let glibc map everything larger than this by itself, and give it back when it is freed."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, mapped_bytes), (-1, mapped_bytes), (-2, 0), (-8, 1)):
            mallopt(option, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX


def settle() -> None:
    """Use once what takes memory at its first use and keeps it."""
    multiply((4096, 1024, 1024), (512, 256, 4096), (4096, 256, 8192))
    touch()


def multiply(*sizes: tuple[int, int, int]) -> None:
    """Let MKL grow its buffers for linear layers of these sizes, rows x inputs x outputs, forward and backward."""
    _tune_malloc(_SMALL_BYTES)
    for rows, inputs, outputs in sizes:
        x, weight = torch.zeros(rows, inputs, requires_grad=True), torch.zeros(outputs, inputs, requires_grad=True)
        F.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
        del x, weight


def touch() -> None:
    """Run a small job with every lever: kernels, optimizers, files. A fork does not have these pages of its parent."""
    _tune_malloc(_SMALL_BYTES)  # leaves no holes in the heap that a job could fill for free
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
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    _tune_malloc(_MAPPED_BYTES)


def _status(key: str) -> int:
    """A size from /proc/self/status in bytes; 0 where there is none."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(key))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def start_count() -> int:
    """Forget the largest resident memory so far; returns what it is now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident_peak()


def resident_peak() -> int:
    """Largest resident memory since `start_count`, in bytes."""
    return _status("VmHWM")
