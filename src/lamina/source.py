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
from lamina.model import Batch
from lamina.ops import Ops
from lamina.spec import Spec

_TEXTS = 256
"""Texts whose lengths are counted at a time."""


class Source(Protocol):
    """Batches of a device's examples."""

    def batch(self, rows: np.ndarray) -> tuple[Batch, Tensor]:
        """What goes into the network, or comes from the prefix, and targets BS."""


@dataclass
class Plain:
    """The examples themselves."""

    shard: Shard
    spec: Spec
    ops: Ops

    def batch(self, rows: np.ndarray) -> tuple[Batch, Tensor]:
        """Ids or images, and targets BS."""
        inputs, targets = self.shard.batch(rows)
        return model.batch(self.spec, inputs, self.ops), self.ops.tensor(targets)


@dataclass
class Cached:
    """What the frozen prefix makes of the examples."""

    shard: Shard
    ops: Ops
    cache: Any
    place_of: dict[int, int]
    lengths: np.ndarray | None

    def batch(self, rows: np.ndarray) -> tuple[Batch, Tensor]:
        """Outputs of the prefix, BSD, up to the end of the longest text, and targets BS."""
        targets = self.ops.tensor(self.shard.batch(rows)[1])
        places = np.array([self.place_of[row] for row in rows.tolist()])
        if self.lengths is None:
            return Batch(self.cache.read(places)), targets
        lengths = self.lengths[places]
        return Batch(self.cache.read(places, int(lengths.max())), self.ops.tensor(lengths)), targets


@torch.no_grad()
def run_prefix(job: Job, shard: Shard, spec: Spec, rows: np.ndarray, ops: Ops) -> Cached:
    """Run the given examples through all that is frozen below the trained blocks, with one block in memory at a time.

    Of the token embedding only the rows of the tokens at hand are taken.
    """
    ops.moment("prefix")
    layout, levers = model.layout(spec), job.plan.levers
    lengths = _lengths(shard, rows) if spec.ragged else None
    tokens = shard.batch(rows[:1])[0].shape[1] if lengths is None else int(lengths.max())
    length = spec.length(tokens)
    width = job.plan.shape(layout, "embed.positions" if spec.patch else "embed.tokens")[1]
    cache = ops.cache(len(rows), (length, width), levers.prefix_cache, levers.cache_bits)
    size, below = ops.few(length), job.plan.below(layout)
    for part in ops.slices(len(rows), size):
        cache.write(part.start, _embedded(job, spec, below, shard.batch(rows[part])[0], tokens, ops))
    for block in range(job.plan.first_trained(layout)):
        params = {name: job.arrays[name] for name in below if layout.params[name].block == block}
        if params:
            for part in ops.slices(len(rows), size):
                x_BSD = cache.read(np.arange(part.start, part.stop))
                given = Batch(x_BSD, None if lengths is None else ops.tensor(lengths[part]))
                hides = given.hides(spec, length, ops)
                del given
                cache.write(part.start, model.run_blocks(spec, params, x_BSD, [block], ops, hides))
                del x_BSD, hides
        del params
    return Cached(shard, ops, cache, {row: place for place, row in enumerate(rows.tolist())}, lengths)


def _embedded(job: Job, spec: Spec, below: frozenset[str], inputs: np.ndarray, tokens: int, ops: Ops) -> Tensor:
    """What blocks see of inputs, with nothing but the embedding in memory, and of its tokens those that are there.

    Texts are made as long as `tokens`.
    """
    names = [name for name in below if model.layout(spec).params[name].part == "embed"]
    if spec.patch:
        return model.embed(spec, {name: job.arrays[name] for name in names}, ops.tensor(inputs), ops)
    inputs = np.maximum(inputs, 0)
    found, ids = np.unique(inputs, return_inverse=True)
    ids = np.pad(ids.reshape(inputs.shape), ((0, 0), (0, tokens - inputs.shape[1])))
    params = {name: job.arrays[name] for name in names if name != "embed.tokens"}
    params["embed.tokens"] = ops.rows(job.arrays, "embed.tokens", found)
    return model.embed(spec, params, ops.tensor(ids), ops)


def _lengths(shard: Shard, rows: np.ndarray) -> np.ndarray:
    """Tokens of some texts, int64 [rows]."""
    parts = (rows[first : first + _TEXTS] for first in range(0, len(rows), _TEXTS))
    return np.concatenate([(shard.batch(part)[0] >= 0).sum(1) for part in parts])
