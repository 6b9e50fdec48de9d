"""Looking at a local round in this process: which tensors are alive when, and what torch's allocator gave out.

A dispatch mode sees every tensor that torch makes and a finalizer sees it go, which needs no support from the code that
is measured. (PyTorch's own `MemTracker` raises when the lowest layers are frozen.) What kernels allocate inside while
they run is not seen; the allocator's count has it.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lamina import client
from lamina.data.task import Shard
from lamina.flash import Flash
from lamina.job import Job, Update
from lamina.ops import Ops
from lamina.packed import Packed
from lamina.spec import Spec
from lamina.timeline import Storage, Timeline

T = TypeVar("T")


def watch_job(job: Job, shard: Shard, spec: Spec) -> tuple[Update, Timeline]:
    """Train a job, its arrays on disk, in this process: the update, and when each tensor was born and freed."""
    with Watch() as watched:
        found = (job.arrays, job.state)
        arrays, state = (_SeenFlash(each.path, watched) if isinstance(each, Flash) else each for each in found)
        update = client.train(replace(job, arrays=arrays, state=state), shard, spec, _SeenOps(watched))
    return update, watched.timeline


def count_allocations(call: Callable[[], T]) -> tuple[T, int]:
    """What a call returns, and most bytes that torch's allocator had given out in it at a time.

    What numpy allocates, such as batches, is not in it.
    """
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _hushed():
        profiler.start()
    returned = call()
    with _hushed():
        profiler.stop()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return returned, max(accumulate(int(event.nbytes()) for event in events))


@contextmanager
def _hushed() -> Iterator[None]:
    """Without standard error, on which torch 2.13 tells that its profiler starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Watch(TorchDispatchMode):
    """Writes a timeline of all tensor memory while it is entered."""

    def __init__(self) -> None:
        """Know nothing yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.timeline = Timeline()
        self._known: dict[int, Storage] = {}
        self._undo: list[Callable[[], None]] = []

    def see(self, tensor: torch.Tensor, category: str = "temporary") -> Storage:
        """The storage of a tensor, which is born now if it was not known."""
        memory = tensor.untyped_storage()
        key = memory._cdata
        if key not in self._known:
            storage = self._known[key] = Storage(memory.nbytes(), category)
            self.timeline.born(storage)
            weakref.finalize(memory, self._gone, key)
        return self._known[key]

    def _gone(self, key: int) -> None:
        self.timeline.died(self._known.pop(key))

    def __enter__(self) -> Watch:
        """Begin to watch."""
        kept = torch.autograd.graph.saved_tensors_hooks(self._kept, lambda tensor: tensor)
        kept.__enter__()
        handles = [
            register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self._gradients(optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, args, kwargs: self._states(optimizer)),
        ]
        self._undo = [lambda: kept.__exit__(None, None, None), *(handle.remove for handle in handles)]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Watch births no more; deaths are still seen."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for undo in self._undo:
            undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the kernel, then look at what it made."""
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, torch.Tensor):
                self.see(each)
        return out

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = self.see(tensor)
        if storage.category == "temporary":
            storage.category = "activations"
        return tensor

    def _gradients(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.see(p.grad).category = "gradients"

    def _states(self, optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self.see(value).category = "optimizer"


class _SeenFlash(Flash):
    """Arrays on disk, seen as weights when they come into memory."""

    def __init__(self, path: Path, watched: Watch) -> None:
        super().__init__(path)
        self._watched = watched

    def __getitem__(self, name: str) -> torch.Tensor:
        array = super().__getitem__(name)
        self._watched.see(array).category = "weights"
        return array


class _SeenOps(Ops):
    """The kernels, and what they do told to the watch where it cannot see it."""

    def __init__(self, watched: Watch) -> None:
        super().__init__()
        self._watched = watched

    def moment(self, name: str) -> None:
        self._watched.timeline.moment = name

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        copied = super().copy(x)
        self._watched.see(copied).category = "weights"
        return copied

    def hold(self, arrays: Mapping[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
        packed = super().hold(arrays, name, bits)
        if isinstance(packed, Packed):
            for each in (packed.data, packed.scale):
                if each is not None:
                    self._watched.see(each).category = "weights"
        return packed
