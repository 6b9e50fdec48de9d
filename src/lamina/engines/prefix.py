"""What frozen prefixes make of the devices' examples, kept for as long as the prefix stays as it is."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from lamina import model
from lamina.data.task import Shard
from lamina.job import Job
from lamina.layout import Params
from lamina.model import Batch
from lamina.ops import HOST, Ops
from lamina.shapes import FLOAT_BYTES
from lamina.spec import Spec

_TOKENS = 2048
"""That run through the prefix at a time."""
_CARD_TOKENS = 2**15
"""The same on a card."""
_WORTH = 0.5
"""All examples of a device run if it uses this share of them, and are kept if it is to come back so many times."""


class Rows(Protocol):
    """Rows of equal shape, in memory or in a file."""

    def write(self, first: int, x: Tensor) -> None:
        """Rows from `first` on."""

    def read(self, places: np.ndarray) -> Tensor:
        """The given rows, in memory of their own."""


@dataclass(frozen=True)
class _InMemory:
    rows: Tensor

    def write(self, first: int, x: Tensor) -> None:
        self.rows[first : first + len(x)] = x

    def read(self, places: np.ndarray) -> Tensor:
        return self.rows.index_select(0, torch.from_numpy(places).to(self.rows.device))


@dataclass(frozen=True)
class _InFile:
    """From `start` on in a file that others use as well, for use on `device`."""

    file: int
    start: int
    count: int
    shape: tuple[int, ...]
    device: torch.device

    def write(self, first: int, x: Tensor) -> None:
        self._whole(lambda part, at: os.pwrite(self.file, part, at), x.contiguous().cpu(), first)

    def read(self, places: np.ndarray) -> Tensor:
        out = torch.empty(len(places), *self.shape)
        for row, place in zip(out, places.tolist(), strict=True):
            self._whole(lambda part, at: os.preadv(self.file, [part], at), row, place)
        return out.to(self.device)

    def _whole(self, move: Callable[[memoryview, int], int], x: Tensor, first: int) -> None:
        """Move all bytes of some rows, however few the system takes at a time."""
        left, at = x.numpy().data.cast("B"), self._at(first)
        while left:
            moved = move(left, at)
            if not moved:
                raise OSError("the file of prefix outputs ends early")
            left, at = left[moved:], at + moved

    def _at(self, place: int) -> int:
        return self.start + FLOAT_BYTES * math.prod(self.shape) * place


@dataclass(frozen=True)
class Feed:
    """Where the batches of a device come from.

    Attributes:
        x: What goes into the trained part, at each place: ids, images, or what the prefix makes of them.
        targets: At each place, int64 [places, ...].
        lengths: Tokens at each place where texts differ in length, int64 [places].
        place_of: Place of each row of the shard; None where they are the same.
    """

    x: Rows
    targets: np.ndarray
    lengths: np.ndarray | None
    place_of: np.ndarray | None

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Of rows of the shard."""
        return rows if self.place_of is None else self.place_of[rows]


@dataclass(frozen=True)
class _Entry:
    """The outputs of the blocks below `boundary` for all examples of a device, and the tensors that made them.

    `made_for` is the network, the bits of its frozen matrices, and whether outputs are rounded to half precision.
    """

    made_for: tuple[Spec, int, bool]
    boundary: int
    made_by: Params
    rows: _InMemory | _InFile


class Prefixes:
    """Outputs of frozen prefixes, by device.

    A tensor of the network that nobody trains stays the same object from round to round, so outputs are good for as
    long as the jobs of a device bring the very tensors that made them. They are kept at the lowest block that any
    device has trained so far: what is between that and a device's own trained blocks changes, and runs in each round.
    All examples of a device run in the same slices whatever is kept, so what is kept changes no bit.

    Attributes:
        found: Examples times blocks that did not have to run.
        made: Examples times blocks that ran.
    """

    def __init__(self, ram_bytes: int, disk_bytes: int) -> None:
        """Keep so much where devices compute, then so much in a temporary file."""
        self._left, self._disk_bytes, self._end = ram_bytes, disk_bytes, 0
        self._entries: dict[int, _Entry] = {}
        self._free: list[_InFile] = []
        self._floor: int | None = None
        self._returns = 0.0
        self._file = tempfile.TemporaryFile() if disk_bytes else None  # noqa: SIM115  # open as long as this is
        if self._file:
            weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self.found = self.made = 0
        self._told = (0, 0)

    def expect(self, jobs: Sequence[Job], spec: Spec, devices: int) -> None:
        """Told all jobs of a round before any of them runs, and the number of devices of the fleet."""
        if not jobs:
            return
        lowest = min(job.plan.first_trained(model.layout(job.plan.runs(spec))) for job in jobs)
        self._floor = lowest if self._floor is None else min(lowest, self._floor)
        turn = jobs[0].turn
        self._returns = (turn.rounds - turn.round - 1) * len(jobs) / devices

    def reused(self) -> float | None:
        """Share of blocks, times examples, that did not have to run since the last call; None if there were none."""
        with self._lock:
            found, made = self.found - self._told[0], self.made - self._told[1]
            self._told = self.found, self.made
        return found / (found + made) if found + made else None

    def feed(self, job: Job, shard: Shard, spec: Spec, rows: np.ndarray, ops: Ops) -> Feed:
        """Where the batches of a job come from.

        Args:
            job: Of the device.
            shard: Its examples, in whatever round.
            spec: The network that it runs.
            rows: The examples that it uses, ascending.
            ops: What computes.
        """
        now, layout = shard.at(job.turn), model.layout(spec)
        whole = len(rows) >= _WORTH * len(shard)
        inputs, targets = now.batch(np.arange(len(shard)) if whole else rows)
        lengths = (inputs >= 0).sum(1) if spec.ragged else None
        place_of = None
        if not whole:
            place_of = np.full(len(shard), -1)
            place_of[rows] = np.arange(len(rows))
        if not job.plan.below(layout):
            return Feed(_InMemory(ops.tensor(inputs)), targets, lengths, place_of)
        lasting = whole and now is shard
        out = self._outputs(job, spec, inputs, lengths, lasting, ops)
        return Feed(out, targets, lengths, place_of)

    @torch.no_grad()
    def _outputs(
        self,
        job: Job,
        spec: Spec,
        inputs: np.ndarray,
        lengths: np.ndarray | None,
        lasting: bool,
        ops: Ops,
    ) -> Rows:
        """What the prefix makes of inputs, from what is known of them; what may last is kept."""
        layout, count = model.layout(spec), len(inputs)
        prefix, first = job.plan.below(layout), job.plan.first_trained(layout)
        caches, levers = job.plan.caches(layout), job.plan.levers
        bits, half = 32 if caches else levers.frozen_bits, caches and levers.cache_bits == 16
        params = {n: ops.hold(job.arrays, n, 32 if n.endswith("bias") else bits) for n in layout.params if n in prefix}
        blocks = model.found_blocks(spec, params)
        known = self._known(job, (spec, bits, half), first) if lasting else None
        start = known.boundary if known else 0
        runs = [block for block in blocks if block >= start]
        with self._lock:
            self.found += count * (len(blocks) - len(runs))
            self.made += count * len(runs)
        if known and start == first:
            return known.rows
        stop = min(first, self._floor or 0)
        tokens = spec.length(inputs.shape[1])
        shape = (tokens, params["embed.positions" if spec.patch else "embed.tokens"].shape[1])
        keeps = lasting and known is None and self._returns >= _WORTH
        kept = self._room(count, shape, ops.device) if keeps else None
        out = kept if kept and stop == first else _InMemory(torch.empty(count, *shape, device=ops.device))

        def rounded(x_BSD: Tensor) -> Tensor:
            return x_BSD.half().float() if half else x_BSD

        def embedded(inputs: np.ndarray) -> Tensor:
            given = inputs if spec.patch else np.maximum(inputs, 0)
            return rounded(model.embed(spec, params, ops.tensor(given), ops))

        def run(x_BSD: Tensor, block: int, hides: Tensor | None) -> Tensor:
            x_BSD = model.forked(spec, x_BSD, block, ops)
            return rounded(model.run_blocks(spec, params, x_BSD, [block], ops, hides))

        most = _TOKENS if ops.device == HOST else _CARD_TOKENS
        for rows in ops.slices(count, max(1, most // tokens)):
            x_BSD = known.rows.read(np.arange(rows.start, rows.stop)) if known else embedded(inputs[rows])
            hides = Batch(x_BSD, None if lengths is None else ops.tensor(lengths[rows])).hides(spec, tokens, ops)
            for block in (block for block in runs if block < stop):
                x_BSD = run(x_BSD, block, hides)
            if kept:
                kept.write(rows.start, x_BSD)
            for block in (block for block in runs if block >= stop):
                x_BSD = run(x_BSD, block, hides)
            if out is not kept:
                out.write(rows.start, x_BSD)
        if kept:
            made_by = {name: job.arrays[name] for name in params if _reaches(layout.params[name].block, stop)}
            with self._lock:
                self._entries[job.turn.device] = _Entry((spec, bits, half), stop, made_by, kept)
        return out

    def _known(self, job: Job, made_for: tuple[Spec, int, bool], first: int) -> _Entry | None:
        """What is kept of a device, if it is still what its job's tensors make; else its room is free again."""
        with self._lock:
            entry = self._entries.get(job.turn.device)
            if entry is None:
                return None
            same = all(job.arrays.get(name) is p for name, p in entry.made_by.items())
            if entry.made_for == made_for and entry.boundary <= first and same:
                return entry
            del self._entries[job.turn.device]
            if isinstance(entry.rows, _InFile):
                self._free.append(entry.rows)
            else:
                self._left += FLOAT_BYTES * entry.rows.rows.numel()
            return None

    def _room(self, count: int, shape: tuple[int, ...], device: torch.device) -> _InMemory | _InFile | None:
        """Room for so many rows, if there is any left."""
        needed = FLOAT_BYTES * count * math.prod(shape)
        with self._lock:
            if needed <= self._left:
                self._left -= needed
                return _InMemory(torch.empty(count, *shape, device=device))
            for free in self._free:
                if (free.count, free.shape) == (count, shape):
                    self._free.remove(free)
                    return free
            if self._file and self._end + needed <= self._disk_bytes and _reserve(self._file, self._end, needed):
                self._end += needed
                return _InFile(self._file.fileno(), self._end - needed, count, shape, device)
        return None


def _reserve(file: IO[bytes], start: int, size: int) -> bool:
    """Whether the disk has that room, which it then keeps for the file; systems that cannot tell find out later."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), start, size)
    except OSError:
        return False
    return True


def _reaches(block: int | None, stop: int) -> bool:
    return block is None or block < stop
