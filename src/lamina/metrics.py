"""Accuracy of a network on every device's test windows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lamina import model
from lamina.data.task import Shard
from lamina.layout import Params
from lamina.model import Spec

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
        """Over devices: plain mean, mean weighted by predictions, and 10th percentile (LEAF, Caldas et al. 2018)."""
        each = self.correct / self.total
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
def evaluate(spec: Spec, params: Params, shards: Sequence[Shard], scored: int, workers: int = 1) -> Score:
    """Run the network over all test windows; the last `scored` positions of each count."""
    rows = [(device, row) for device, shard in enumerate(shards) for row in range(len(shard))]
    chunks = [np.array(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]

    @torch.no_grad()
    def hits(chunk: np.ndarray) -> np.ndarray:
        batches = [shards[device].batch(chunk[chunk[:, 0] == device, 1]) for device in np.unique(chunk[:, 0])]
        ids_BS, targets_BS = (torch.from_numpy(np.concatenate(part)) for part in zip(*batches, strict=True))
        logits_BSV = model.forward(spec, params, ids_BS, last=scored)
        right: np.ndarray = (logits_BSV.argmax(-1) == targets_BS[:, -scored:]).sum(1).numpy()
        return right

    with ThreadPoolExecutor(workers) as pool:
        found = np.concatenate(list(pool.map(hits, chunks)))
    device_of = np.array(rows)[:, 0]
    correct = np.bincount(device_of, weights=found, minlength=len(shards)).astype(np.int64)
    return Score(correct, scored * np.bincount(device_of, minlength=len(shards)))
