"""Accuracy of a network on every device's test examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lamina import model
from lamina.data.task import Shard
from lamina.layout import Params
from lamina.machine import threads
from lamina.ops import TORCH, Ops
from lamina.spec import Spec

_BATCH = 128


@dataclass(frozen=True)
class Score:
    """Correct predictions and predictions made, per device.

    Attributes:
        correct: int64 [devices].
        total: int64 [devices].
    """

    correct: np.ndarray
    total: np.ndarray

    def accuracy(self) -> dict[str, float]:
        """Over devices with test examples: plain mean, mean weighted by predictions, 10th percentile (LEAF, 2018)."""
        each = self.correct[self.total > 0] / self.total[self.total > 0]
        return {
            "mean_over_devices": float(each.mean()),
            "weighted": float(self.correct.sum() / self.total.sum()),
            "p10": float(np.percentile(each, 10)),
        }

    def of(self, devices: Sequence[int]) -> Score:
        """The score of some of the devices."""
        rows = np.array(devices, dtype=int)
        return Score(self.correct[rows], self.total[rows])


@torch.no_grad()
def evaluate(
    spec: Spec,
    params: Params,
    shards: Sequence[Shard],
    scored: int,
    workers: int = 1,
    devices: Sequence[int] | np.ndarray | None = None,
    ops: Ops = TORCH,
) -> Score:
    """Run the network over test examples, of which a device may have none; the last `scored` positions count.

    Args:
        spec: The network.
        params: Its tensors.
        shards: Test examples of every device.
        scored: Positions at the end of each that count.
        workers: Threads.
        devices: Whose examples are run, ascending; None: everyone's. Of the others, no prediction is counted.
        ops: What computes, and where.
    """
    counts = np.zeros(len(shards), np.int64)
    for device in range(len(shards)) if devices is None else devices:
        counts[device] = len(shards[device])
    device_of = np.repeat(np.arange(len(shards)), counts)
    rows = np.stack([device_of, np.arange(len(device_of)) - (np.cumsum(counts) - counts)[device_of]], axis=1)
    params = {name: p.to(ops.device) for name, p in params.items()}
    chunks = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    if not chunks:
        return Score(counts, counts)

    @torch.no_grad()
    def hits(chunk: np.ndarray) -> np.ndarray:
        batches = [shards[device].batch(chunk[chunk[:, 0] == device, 1]) for device in np.unique(chunk[:, 0])]
        inputs, targets_BS = (_joined(part) for part in zip(*batches, strict=True))
        logits_BSV = model.forward(spec, params, model.batch(spec, inputs, ops), ops, scored)
        right: np.ndarray = (logits_BSV.argmax(-1).cpu().numpy() == targets_BS[:, -scored:]).sum(1)
        return right

    with threads(workers) as pool:
        found = np.concatenate(list(pool.map(hits, chunks)))
    correct = np.bincount(device_of, weights=found, minlength=len(shards)).astype(np.int64)
    return Score(correct, scored * counts)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays one after another; where texts of some are longer, -1 follows those of the others."""
    longest = max(part.shape[1] for part in parts)
    if parts[0].ndim == 2:
        parts = [np.pad(part, ((0, 0), (0, longest - part.shape[1])), constant_values=-1) for part in parts]
    return np.concatenate(parts)
