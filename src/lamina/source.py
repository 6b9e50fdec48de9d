"""What goes into the trained part of a network: the examples, or what a frozen prefix that runs once makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lamina import model
from lamina.data.task import Shard
from lamina.job import Job
from lamina.model import Spec
from lamina.ops import Ops


class Source(Protocol):
    """Batches of a device's examples."""

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What goes into the network, ids BS or BSD from the prefix, and targets BS."""


@dataclass
class Plain:
    """The examples themselves."""

    shard: Shard
    ops: Ops

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and targets, BS each."""
        ids, targets = self.shard.batch(rows)
        return self.ops.tensor(ids), self.ops.tensor(targets)


@dataclass
class Cached:
    """What the frozen prefix makes of the examples."""

    shard: Shard
    ops: Ops
    cache: Any
    place_of: dict[int, int]

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Outputs of the prefix, BSD, and targets BS."""
        targets = self.ops.tensor(self.shard.batch(rows)[1])
        return self.cache.read(np.array([self.place_of[row] for row in rows.tolist()])), targets


@torch.no_grad()
def run_prefix(job: Job, shard: Shard, spec: Spec, rows: np.ndarray, ops: Ops) -> Cached:
    """Run the given examples through all that is frozen below the trained blocks, with one block in memory at a time.

    Of the token embedding only the rows of the tokens at hand are taken.
    """
    ops.moment("prefix")
    layout, levers = model.layout(spec), job.plan.levers
    length = shard.batch(rows[:1])[0].shape[1]
    width = job.plan.shape(layout, "embed.tokens")[1]
    cache = ops.cache(len(rows), (length, width), levers.prefix_cache, levers.cache_bits)
    size, below = ops.few(length), job.plan.below(layout)
    for part in ops.slices(len(rows), size):
        found, ids = np.unique(shard.batch(rows[part])[0], return_inverse=True)
        params = {
            "embed.tokens": ops.rows(job.arrays, "embed.tokens", found),
            "embed.positions": job.arrays["embed.positions"],
        }
        cache.write(part.start, model.embed(spec, params, ops.tensor(ids.reshape(-1, length)), ops))
        del params
    for block in range(job.plan.first_trained(layout)):
        params = {name: job.arrays[name] for name in below if layout.params[name].block == block}
        if params:
            for part in ops.slices(len(rows), size):
                x_BSD = cache.read(np.arange(part.start, part.stop))
                cache.write(part.start, model.run_blocks(spec, params, x_BSD, [block], ops))
                del x_BSD
        del params
    return Cached(shard, ops, cache, {row: place for place, row in enumerate(rows.tolist())})
